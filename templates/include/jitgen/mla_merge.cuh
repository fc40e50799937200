// Splits of a sequence: what each part leaves in global memory, and how the parts together merge it, in a fixed order.
#pragma once
#include "jitgen/mla_plan.cuh"
#include "jitgen/mla_softmax.cuh"

namespace jitgen {

// Partial outputs, not yet divided, and their rows' maxima and sums: [part][0: its first, 1: its last segment][tile].
// Outputs lie as wgmma's accumulators do, four of a thread side by side: columns 8 j + 2 t and the next one of rows g
// and g + 8, for [16 rows][half of the columns][j][lane 4 g + t].
template <u32 kTiles, u32 kDimV> struct Partials {
    static constexpr u32 kStripUnits = 16 * kDimV / 4;  // of 16 rows
    float4* out;
    float2* states;
    u32* counters;  // [part][tile], of the sequence that begins in the part: all zero between launches

    // Of the part that begins the sequence it is the last segment, of the others the first.
    __device__ __forceinline__ u64 tile(u32 part, bool begins, u32 index) const {
        return u64(part * 2 + begins) * kTiles + index;
    }
    __device__ __forceinline__ u32* counter(const Segment& segment, u32 index) const {
        return counters + segment.first_part * kTiles + index;
    }
};

// Where results go: rows of a sequence are those of its tokens' heads. With kTokens > 1 each token is a sequence of its
// own, and kTokens of them follow one another in o and in lse.
template <class T, u32 kHeads, u32 kQueries, u32 kDimV, u32 kTokens, bool kHasSink> struct Results {
    static constexpr u32 kRows = kHeads * kQueries, kHalfV = kDimV / 2, kStripUnits = 16 * kDimV / 4;
    T* o;
    float* lse;
    const float* sink;  // of each head, if kHasSink

    // What a row's output is divided by.
    __device__ __forceinline__ float denominator(u32 row, float max, float sum) const {
        if constexpr (kHasSink) {
            if (sum != 0.0f) return sum + exp2_approx(__ldg(sink + row % kHeads) * 1.44269504f - max);
        }
        return sum;
    }
    static __device__ __forceinline__ float factor(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

    __device__ __forceinline__ T* at(u32 sequence, u32 row, u32 column) const {
        return o + (u64(sequence) * kRows + row) * kDimV + column;
    }
    __device__ __forceinline__ void store_lse(u32 sequence, u32 row, float max, float sum) const {
        if (row >= kRows) return;
        const u64 head = u64(sequence / kTokens) * kHeads + row % kHeads;
        const u64 index = (head * kTokens + sequence % kTokens) * kQueries + row / kHeads;
        lse[index] = sum == 0.0f ? infinity() : (max + log2f(sum)) * 0.693147181f;
    }
    // A unit of four merged outputs, and the sums of its two rows.
    __device__ __forceinline__ void store_unit(u32 sequence, u32 tile, u32 unit, float4 v, float2 sums) const {
        const u32 row = tile * 64 + unit / kStripUnits * 16 + unit % 32 / 4;
        const u32 column = unit / (kStripUnits / 2) % 2 * kHalfV + unit / 32 % (kHalfV / 8) * 8 + unit % 4 * 2;
        const float first = factor(sums.x), second = factor(sums.y);
        u32* to = reinterpret_cast<u32*>(at(sequence, row, column));
        if (row < kRows) *to = pack<T>(v.x * first, v.y * first);
        if (row + 8 < kRows) to[8 * kDimV / 2] = pack<T>(v.z * second, v.w * second);
    }
};

// What every split of a segment's sequence counts for in the merge, in shared memory: [split][row of the tile] factors,
// then what all rows' sums come to, and their maxima. By 256 threads, which share the rows and four splits at a time.
template <u32 kTiles, u32 kDimV> struct MergeWeights {
    u32 smem, count;

    static constexpr u32 kThreads = 256, kRows = 64, kGroups = kThreads / kRows;
    static constexpr u32 kBatch = 8;  // loads on their way at a time: L2 answers after about 700 cycles

    __device__ __forceinline__ u32 factor(u32 split, u32 row) const { return smem + (split * kRows + row) * 4; }
    __device__ __forceinline__ u32 max(u32 row) const { return factor(count, row); }
    __device__ __forceinline__ u32 sum(u32 row) const { return factor(count + 1, row); }

    __device__ __forceinline__ void prepare(const Partials<kTiles, kDimV>& partials, const Segment& segment, u32 tile,
                                            u32 barrier) const {
        const u32 row = threadIdx.x % kRows, group = threadIdx.x / kRows;
        const u32 exchange = factor(count + 2, group * kRows + row);
        float top = -infinity();
#pragma unroll 1
        for (u32 first = group; first < count; first += kBatch * kGroups) {
            float2 states[kBatch];
#pragma unroll
            for (u32 i = 0; i < kBatch; ++i) {
                const u32 split = min(first + i * kGroups, count - 1);
                const u64 at = partials.tile(segment.first_part + split, split == 0, tile);
                states[i] = ld_l2(partials.states + at * kRows + row);
            }
#pragma unroll
            for (u32 i = 0; i < kBatch; ++i) {
                const u32 split = first + i * kGroups;
                if (split >= count) break;
                top = fmaxf(top, states[i].x);
                st_shared(factor(split, row), states[i].x);
                st_shared(factor(split + count + 2 + kGroups, row), states[i].y);
            }
        }
        st_shared(exchange, top);
        named_barrier_sync<kThreads>(barrier);
#pragma unroll
        for (u32 i = 0; i < kGroups; ++i) top = fmaxf(top, ld_shared(factor(count + 2 + i, row)));
        named_barrier_sync<kThreads>(barrier);
        const float base = top == -infinity() ? 0.0f : top;  // no keys: all factors are 0
        float total = 0.0f;
        for (u32 split = group; split < count; split += kGroups) {
            const float f = exp2_approx(ld_shared(factor(split, row)) - base);
            total += f * ld_shared(factor(split + count + 2 + kGroups, row));
            st_shared(factor(split, row), f);
        }
        st_shared(exchange, total);
        named_barrier_sync<kThreads>(barrier);
        if (group > 0) return;
        total = 0.0f;
#pragma unroll
        for (u32 i = 0; i < kGroups; ++i) total += ld_shared(factor(count + 2 + i, row));
        st_shared(max(row), top);
        st_shared(sum(row), total);
    }

    // out[k] = units `unit` + k * width of the splits `from`, `from` + step .. added up, for those below `last`.
    template <u32 kUnits>
    __device__ __forceinline__ void add_up(float4 (&out)[kUnits], const Partials<kTiles, kDimV>& partials,
                                           const Segment& segment, u32 tile, u32 unit, u32 width, u32 last, u32 from,
                                           u32 step) const {
        constexpr u32 kSplits = kBatch / kUnits, kStrip = Partials<kTiles, kDimV>::kStripUnits;
#pragma unroll
        for (u32 k = 0; k < kUnits; ++k) out[k] = {};
#pragma unroll 1
        for (u32 first = from; first < count; first += kSplits * step) {
            float4 values[kSplits][kUnits];
#pragma unroll
            for (u32 i = 0; i < kSplits; ++i) {
                const u32 split = min(first + i * step, count - 1);
                const u64 at = partials.tile(segment.first_part + split, split == 0, tile);
                const float4* base = partials.out + at * (4 * kStrip);
#pragma unroll
                for (u32 k = 0; k < kUnits; ++k) values[i][k] = ld_l2(base + min(unit + k * width, last - 1));
            }
#pragma unroll
            for (u32 i = 0; i < kSplits; ++i) {
                const u32 split = first + i * step;
                if (split >= count) break;
#pragma unroll
                for (u32 k = 0; k < kUnits; ++k) {
                    const u32 at = min(unit + k * width, last - 1), row = at / kStrip * 16 + at % 32 / 4;
                    const float f = ld_shared(factor(split, row)), g = ld_shared(factor(split, row + 8));
                    const float4 v = values[i][k];
                    out[k] = {out[k].x + f * v.x, out[k].y + f * v.y, out[k].z + g * v.z, out[k].w + g * v.w};
                }
            }
        }
    }
};

// Merges a part's share of the outputs of a sequence that it shares. By 256 threads, which meet at `barrier`.
template <class T, u32 kHeads, u32 kQueries, u32 kDimV, u32 kTokens, bool kHasSink, u32 kTiles>
__device__ __forceinline__ void merge(const Partials<kTiles, kDimV>& partials,
                                      const Results<T, kHeads, kQueries, kDimV, kTokens, kHasSink>& results, const Segment& segment,
                                      u32 part, u32 tile, u32 smem, u32 barrier) {
    constexpr u32 kThreads = 256, kRows = kHeads * kQueries, kStrip = Partials<kTiles, kDimV>::kStripUnits;
    u32* counter = partials.counter(segment, tile);
    if (threadIdx.x == 0) wait_at_least(counter, segment.num_parts);
    named_barrier_sync<kThreads>(barrier);
    const u32 count = segment.num_parts, index = part - segment.first_part;
    const MergeWeights<kTiles, kDimV> weights{smem + kThreads * 16, count};
    weights.prepare(partials, segment, tile, barrier);
    named_barrier_sync<kThreads>(barrier);
    if (index == 0 && threadIdx.x < 64)
        results.store_lse(segment.sequence, tile * 64 + threadIdx.x, ld_shared(weights.max(threadIdx.x)),
                          ld_shared(weights.sum(threadIdx.x)));
    // The share, in units of four outputs, whole 32-byte sectors of O.
    const u32 num_units = ceil_div(min(64u, kRows - tile * 64), 16) * kStrip;
    const u32 share = round_up(ceil_div(num_units, count), 8);
    const u32 first = index * share, last = min(first + share, num_units);
    auto store = [&](u32 unit, float4 v) {
        const u32 row = unit / kStrip * 16 + unit % 32 / 4;
        auto sum = [&](u32 r) {
            return results.denominator(tile * 64 + r, ld_shared(weights.max(r)), ld_shared(weights.sum(r)));
        };
        const float2 sums = {sum(row), sum(row + 8)};
        results.store_unit(segment.sequence, tile, unit, v, sums);
    };
    if (share > kThreads / 2) {
        // Few splits: every thread adds up all splits of four units at a time.
        constexpr u32 kUnits = 4;
#pragma unroll 1
        for (u32 unit = first + threadIdx.x; unit < last; unit += kUnits * kThreads) {
            float4 out[kUnits];
            weights.template add_up<kUnits>(out, partials, segment, tile, unit, kThreads, last, 0, 1);
#pragma unroll
            for (u32 k = 0; k < kUnits; ++k)
                if (unit + k * kThreads < last) store(unit + k * kThreads, out[k]);
        }
    } else if (first < last) {
        // Many splits: groups of threads share those of one unit.
        u32 width = kThreads / 2;
        while (width / 2 >= share) width /= 2;
        const u32 unit = first + threadIdx.x % width, mine = smem + threadIdx.x * 16;
        float4 out[1];
        weights.template add_up<1>(out, partials, segment, tile, unit, 0, last, threadIdx.x / width, kThreads / width);
        st_shared(mine, out[0]);
        named_barrier_sync<kThreads>(barrier);
        if (threadIdx.x < width && unit < last) {
            float4 total = {};
            for (u32 i = 0; i < kThreads; i += width) {
                const float4 v = ld_shared_v4(mine + i * 16);
                total = {total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w};
            }
            store(unit, total);
        }
    }
    // The last to have seen the counter puts it back to zero.
    if (threadIdx.x == 0 && atomic_add_release(counter, 1) == 2 * count - 1) *counter = 0;
    named_barrier_sync<kThreads>(barrier);  // before shared memory is another merge's
}

}  // namespace jitgen
