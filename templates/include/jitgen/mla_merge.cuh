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

// A unit of four outputs merged so far: for both rows the maximum, and sum and outputs relative to it.
struct Merged {
    RowState rows;
    float4 out = {};

    __device__ __forceinline__ void add(float2 first, float2 second, float4 v) {
        float own[2], other[2];
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            const float2 state = row == 0 ? first : second;
            const float top = fmaxf(rows.max[row], state.x);
            own[row] = rows.grow(row, top);
            other[row] = exp2_approx(state.x - (top == -infinity() ? 0.0f : top));
            rows.sum[row] += state.y * other[row];
        }
        out = {out.x * own[0] + v.x * other[0], out.y * own[0] + v.y * other[0], out.z * own[1] + v.z * other[1],
               out.w * own[1] + v.w * other[1]};
    }
};

// The unit of every `step`-th split from `from` on; its rows are `row` and `row` + 8 of the tile.
template <u32 kTiles, u32 kDimV>
__device__ __forceinline__ Merged merge_splits(const Partials<kTiles, kDimV>& partials, const Segment& segment,
                                               u32 tile, u32 unit, u32 row, u32 from, u32 step) {
    constexpr u32 kBatch = 6;  // splits on their way at a time: L2 answers after about 700 cycles
    Merged merged;
#pragma unroll 1
    for (u32 first = from; first < segment.num_parts; first += kBatch * step) {
        float2 states[kBatch][2];
        float4 values[kBatch];
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i) {
            const u32 split = first + i * step;
            if (split < segment.num_parts) {
                const u64 at = partials.tile(segment.first_part + split, split == 0, tile);
                values[i] = ld_l2(partials.out + at * (4 * partials.kStripUnits) + unit);
                states[i][0] = ld_l2(partials.states + at * 64 + row);
                states[i][1] = ld_l2(partials.states + at * 64 + row + 8);
            }
        }
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i)
            if (first + i * step < segment.num_parts) merged.add(states[i][0], states[i][1], values[i]);
    }
    return merged;
}

}  // namespace jitgen
