// Splits of a sequence: what each part leaves in global memory, and how the parts together merge it, in a fixed order.
#pragma once
#include "jitgen/mla_plan.cuh"
#include "jitgen/mla_softmax.cuh"

namespace jitgen {

// Partial outputs, not yet divided, and their rows' maxima and sums: [part][0: its first, 1: its last segment][tile].
// Outputs lie as wgmma's accumulators do, four of a thread side by side: columns 8 j + 2 t and the next one of rows g and
// g + 8, for [16 rows][half of the columns][j][lane 4 g + t].
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
                const float4* base = partials.out +
                    partials.tile(segment.first_part + split, split == 0, tile) * (4 * kStrip);
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

}  // namespace jitgen
