// Splits of a sequence: what each part leaves in global memory, and how the parts together merge it, in a fixed order.
#pragma once
#include "jitgen/mla_plan.cuh"
#include "jitgen/mla_softmax.cuh"

namespace jitgen {

// How outputs lie in wgmma's accumulators, in units of four, two columns of two rows, in strips of rows.
// Query rows are the accumulators' rows: columns 8 j + 2 t and the next one of rows g and g + 8, for [16 rows][half of
// the columns][j][lane 4 g + t].
template <u32 kDimV> struct RowUnits {
    static constexpr u32 kStripRows = 16, kStripUnits = kStripRows * kDimV / 4, kSecondRow = 8;
    static __device__ __forceinline__ u32 row(u32 unit) { return unit / kStripUnits * 16 + unit % 32 / 4; }
    static __device__ __forceinline__ u32 column(u32 unit) {
        return unit / (kStripUnits / 2) % 2 * (kDimV / 2) + unit / 32 % (kDimV / 16) * 8 + unit % 4 * 2;
    }
};
// Query rows are the accumulators' columns: output columns 16 j + 2 g and the next one of rows 2 t and 2 t + 1, for
// [8 rows][j][lane 4 g + t].
template <u32 kDimV> struct ColumnUnits {
    static constexpr u32 kStripRows = 8, kStripUnits = kStripRows * kDimV / 4, kSecondRow = 1;
    static __device__ __forceinline__ u32 row(u32 unit) { return unit / kStripUnits * 8 + unit % 4 * 2; }
    static __device__ __forceinline__ u32 column(u32 unit) { return unit / 32 % (kDimV / 16) * 16 + unit % 32 / 4 * 2; }
};

// Partial outputs, not yet divided, and their rows' maxima and sums: [part][0: its first, 1: its last segment][tile].
template <u32 kTiles, u32 kDimV, class Units_ = RowUnits<kDimV>> struct Partials {
    using Units = Units_;
    static constexpr u32 kRows = 64;  // of a tile, at most
    static constexpr u32 kTileUnits = kRows * kDimV / 4;
    static constexpr u32 kStripUnits = Units::kStripUnits;
    float4* out;
    float2* states;
    u32* counters;  // [part][tile], of the sequence that begins in the part: all zero between launches

    // Of the part that begins the sequence it is the last segment, of the others the first.
    __device__ __forceinline__ u32 tile(u32 part, bool begins, u32 index) const {
        return (part * 2 + begins) * kTiles + index;
    }
    __device__ __forceinline__ u32* counter(const Segment& segment, u32 index) const {
        return counters + segment.first_part * kTiles + index;
    }
    // Counts a part that has left its share, or has read the others'; the last of these puts the counter back to 0.
    __device__ __forceinline__ void count(const Segment& segment, u32 index) const {
        count_release(counter(segment, index), 2 * segment.num_parts - 1);
    }
};

// A unit of outputs, four of a thread, with the states of its two rows: what some splits come to together.
struct Merged {
    float4 out = {};
    float max[2] = {-infinity(), -infinity()}, sum[2] = {};

    // Adds `kCount` others, those of splits that follow.
    template <u32 kCount>
    __device__ __forceinline__ void add(const float4 (&outs)[kCount], const float2 (&first)[kCount],
                                        const float2 (&second)[kCount]) {
        float top[2] = {max[0], max[1]};
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) top[0] = fmaxf(top[0], first[i].x), top[1] = fmaxf(top[1], second[i].x);
        // Without keys so far, all are -inf: all factors are 0.
        const float base[2] = {top[0] == -infinity() ? 0.0f : top[0], top[1] == -infinity() ? 0.0f : top[1]};
        const float f = exp2_approx(max[0] - base[0]), g = exp2_approx(max[1] - base[1]);
        out = {out.x * f, out.y * f, out.z * g, out.w * g};
        sum[0] *= f, sum[1] *= g;
#pragma unroll
        for (u32 i = 0; i < kCount; ++i) {
            const float a = exp2_approx(first[i].x - base[0]), b = exp2_approx(second[i].x - base[1]);
            out = {out.x + a * outs[i].x, out.y + a * outs[i].y, out.z + b * outs[i].z, out.w + b * outs[i].w};
            sum[0] += a * first[i].y, sum[1] += b * second[i].y;
        }
        max[0] = top[0], max[1] = top[1];
    }
};

// Where results go: rows of a sequence are those of its tokens' heads. With kTokens > 1 each token is a sequence of its
// own, and kTokens of them follow one another in o and in lse.
template <class T, u32 kHeads, u32 kQueries, u32 kDimV, u32 kTokens, bool kHasSink, u32 kTileRows_>
struct Results {
    static constexpr u32 kTileRows = kTileRows_, kRows = kHeads * kQueries;
    static constexpr u32 kHalfV = kDimV / 2;
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
    // A unit of four merged outputs.
    template <class Units> __device__ __forceinline__ void store_unit(u32 sequence, u32 tile, u32 unit,
                                                                      const Merged& v) const {
        const u32 row = tile * kTileRows + Units::row(unit), other = row + Units::kSecondRow;
        const float first = factor(denominator(row, v.max[0], v.sum[0]));
        const float second = factor(denominator(other, v.max[1], v.sum[1]));
        store_outputs<Units>(sequence, tile, unit, {v.out.x * first, v.out.y * first, v.out.z * second, v.out.w * second});
        if (Units::column(unit) > 0) return;
        store_lse(sequence, row, v.max[0], v.sum[0]);
        store_lse(sequence, other, v.max[1], v.sum[1]);
    }
    template <class Units> __device__ __forceinline__ void store_outputs(u32 sequence, u32 tile, u32 unit,
                                                                         float4 v) const {
        const u32 row = tile * kTileRows + Units::row(unit);
        u32* to = reinterpret_cast<u32*>(at(sequence, row, Units::column(unit)));
        if (row < kRows) *to = pack<T>(v.x, v.y);
        if (row + Units::kSecondRow < kRows) to[Units::kSecondRow * kDimV / 2] = pack<T>(v.z, v.w);
    }
};

// Merges a part's share of the outputs of a sequence that it shares with others, with kSlots partial results on a
// thread's way at a time, with their states, or kFewSlots without: L2 answers after 700 clocks.
template <class Shares, class Outcome, u32 kSlots = 12, u32 kFewSlots = 32> struct Merger {
    using Units = typename Shares::Units;
    static constexpr u32 kRows = Outcome::kRows;
    static constexpr u32 kFewSplits = 8, kFewUnits = 8 * 32;  // of so few splits a warp merges so many units at a time

    const Shares& partials;
    const Outcome& results;
    const Segment segment;
    const u32 tile;
    const bool has_pairs;  // parts 2 i and 2 i + 1 left what they have together, as the former's

    __device__ __forceinline__ u32 num_splits() const {
        const u32 last = segment.first_part + segment.num_parts - 1;
        return (last >> has_pairs) - (segment.first_part >> has_pairs) + 1;
    }
    // Which tile of partial results is that of a split.
    __device__ __forceinline__ u32 at(u32 split) const {
        const u32 part = (segment.first_part >> has_pairs) + split << has_pairs;
        return split == 0 ? partials.tile(segment.first_part, true, tile) : partials.tile(part, false, tile);
    }

    // Units `unit` + k * stride, below `last`, of the splits `from`, `from` + step ..
    template <u32 kUnits, u32 kSplits>
    __device__ __forceinline__ void gather(Merged (&merged)[kUnits], u32 unit, u32 stride, u32 last, u32 from,
                                           u32 step) const {
#pragma unroll 1
        for (u32 base = from; base < num_splits(); base += kSplits * step) {
            float4 outs[kUnits][kSplits];
            float2 states[kUnits][2][kSplits];
#pragma unroll
            for (u32 i = 0; i < kSplits; ++i) {
                const u32 split = base + i * step;
                const float2* its_states = partials.states + u64(at(split)) * Shares::kRows;
                const float4* its_outs = partials.out + u64(at(split)) * Shares::kTileUnits;
#pragma unroll
                for (u32 k = 0; k < kUnits; ++k) {
                    const u32 index = unit + k * stride;
                    const bool is_there = split < num_splits() && index < last;
                    const float2* state = its_states + Units::row(index);
                    outs[k][i] = ld_l2_if(is_there, its_outs + index, float4{});
                    states[k][0][i] = ld_l2_if(is_there, state, {-infinity(), 0.0f});
                    states[k][1][i] = ld_l2_if(is_there, state + Units::kSecondRow, {-infinity(), 0.0f});
                }
            }
#pragma unroll
            for (u32 k = 0; k < kUnits; ++k) merged[k].add(outs[k], states[k][0], states[k][1]);
        }
    }

    // Every thread adds up all splits of kUnits units at a time.
    template <u32 kUnits>
    __device__ __forceinline__ void merge_units(u32 first, u32 last, u32 thread, u32 threads) const {
#pragma unroll 1
        for (u32 unit = first + thread; unit < last; unit += kUnits * threads) {
            Merged merged[kUnits];
            gather<kUnits, kSlots / kUnits>(merged, unit, threads, last, 0, 1);
#pragma unroll
            for (u32 k = 0; k < kUnits; ++k)
                if (unit + k * threads < last)
                    results.template store_unit<Units>(segment.sequence, tile, unit + k * threads, merged[k]);
        }
    }

    // Of few splits each warp adds up units of the same rows: their factors are made once.
    template <u32 kSplits>
    __device__ __forceinline__ void merge_few(u32 first, u32 last, u32 thread, u32 threads) const {
        constexpr u32 kUnits = kFewSlots / kSplits < 8 ? kFewSlots / kSplits : 8;
        static_assert(Units::kStripUnits % (kUnits * 32) == 0, "of one strip, where a lane's rows are the same");
#pragma unroll 1
        for (u32 base = first + thread / 32 * (kUnits * 32); base < last; base += threads * kUnits) {
            const u32 unit = base + thread % 32, row = Units::row(unit);
            float2 states[2][kSplits];
            float4 outs[kUnits][kSplits];
#pragma unroll
            for (u32 i = 0; i < kSplits; ++i) {
                const float2* state = partials.states + u64(at(i)) * Shares::kRows + row;
                const float4* out = partials.out + u64(at(i)) * Shares::kTileUnits + unit;
#pragma unroll
                for (u32 k = 0; k < 2; ++k)
                    states[k][i] = ld_l2_if(i < num_splits(), state + k * Units::kSecondRow, {-infinity(), 0.0f});
#pragma unroll
                for (u32 k = 0; k < kUnits; ++k) outs[k][i] = ld_l2_if(i < num_splits(), out + k * 32, float4{});
            }
            float factors[2][kSplits];
#pragma unroll
            for (u32 k = 0; k < 2; ++k) {
                const u32 of_row = tile * Outcome::kTileRows + row + k * Units::kSecondRow;
                float max = states[k][0].x, sum = 0.0f;
#pragma unroll
                for (u32 i = 1; i < kSplits; ++i) max = fmaxf(max, states[k][i].x);
                const float base = max == -infinity() ? 0.0f : max;  // without keys all are -inf, all factors 0
#pragma unroll
                for (u32 i = 0; i < kSplits; ++i)
                    factors[k][i] = exp2_approx(states[k][i].x - base), sum += factors[k][i] * states[k][i].y;
                const float factor = results.factor(results.denominator(of_row, max, sum));
#pragma unroll
                for (u32 i = 0; i < kSplits; ++i) factors[k][i] *= factor;
                if (Units::column(unit) == 0) results.store_lse(segment.sequence, of_row, max, sum);
            }
#pragma unroll
            for (u32 k = 0; k < kUnits; ++k) {
                float4 sum = {};
#pragma unroll
                for (u32 i = 0; i < kSplits; ++i) {
                    const float4 v = outs[k][i];
                    sum = {sum.x + factors[0][i] * v.x, sum.y + factors[0][i] * v.y, sum.z + factors[1][i] * v.z,
                           sum.w + factors[1][i] * v.w};
                }
                results.template store_outputs<Units>(segment.sequence, tile, unit + k * 32, sum);
            }
        }
    }

    // Groups of threads share the splits of one unit, and add up by way of 32 bytes of shared memory a thread.
    __device__ __forceinline__ void merge_grouped(u32 first, u32 last, u32 thread, u32 threads, u32 smem,
                                                  u32 barrier) const {
        u32 width = threads;
        while (width / 2 >= last - first) width /= 2;
        const u32 unit = first + thread % width, groups = threads / width;
        Merged merged[1];
        gather<1, kSlots>(merged, unit, 0, last, thread / width, groups);
        const Merged& own = merged[0];
        st_shared(smem + thread * 16, own.out);
        st_shared(smem + (threads + thread) * 16, float4{own.max[0], own.sum[0], own.max[1], own.sum[1]});
        named_barrier_sync(barrier, threads);
        if (thread >= width || unit >= last) return;
        Merged total;
        for (u32 i = 0; i < groups; ++i) {
            const float4 v = ld_shared_v4(smem + (i * width + thread) * 16);
            const float4 state = ld_shared_v4(smem + (threads + i * width + thread) * 16);
            const float4 outs[1] = {v};
            const float2 first_row[1] = {{state.x, state.y}}, second_row[1] = {{state.z, state.w}};
            total.add(outs, first_row, second_row);
        }
        results.template store_unit<Units>(segment.sequence, tile, unit, total);
    }

    // By `threads` threads, 128 or 256, of which this one is `thread`; they meet at `barrier`.
    __device__ __forceinline__ void run(u32 part, u32 thread, u32 threads, u32 smem, u32 barrier) const {
        if (thread == 0) wait_at_least(partials.counter(segment, tile), segment.num_parts);
        named_barrier_sync(barrier, threads);
        // The share, in units of four outputs, whole 32-byte sectors of O.
        const u32 num_rows = min(Outcome::kTileRows, kRows - tile * Outcome::kTileRows);
        const u32 num_units = ceil_div(num_rows, Units::kStripRows) * Units::kStripUnits;
        const bool are_few = num_splits() <= kFewSplits;
        const u32 share = round_up(ceil_div(num_units, segment.num_parts), are_few ? kFewUnits : 8);
        const u32 first = (part - segment.first_part) * share, last = min(first + share, num_units);
        if (are_few) {
            if (num_splits() <= 2) merge_few<2>(first, last, thread, threads);
            else if (num_splits() <= 4) merge_few<4>(first, last, thread, threads);
            else merge_few<kFewSplits>(first, last, thread, threads);
        } else if (share <= threads) {
            if (first < last) merge_grouped(first, last, thread, threads, smem, barrier);
        } else {
            merge_units<kSlots / 6>(first, last, thread, threads);
        }
        named_barrier_sync(barrier, threads);
        if (thread == 0) partials.count(segment, tile);
    }
};

}  // namespace jitgen
