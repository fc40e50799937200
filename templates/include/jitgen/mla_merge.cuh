// Splits of a sequence: what each part leaves in global memory, and how the parts together merge it, in a fixed order.
#pragma once
#include "jitgen/mla_plan.cuh"
#include "jitgen/mla_softmax.cuh"

namespace jitgen {

// Partial outputs, not yet divided, with their rows' maxima and sums: [part][0: its first, 1: its last segment][tile].
template <u32 kTiles, u32 kDimV> struct Partials {
    float* out;
    float2* states;
    u32* counters;  // [part][tile], of the sequence that begins in the part: all zero between launches

    // Of the part that begins the sequence it is the last segment, of the others the first.
    __device__ __forceinline__ u64 row(u32 part, bool begins, u32 tile) const {
        return (u64(part * 2 + begins) * kTiles + tile) * 64;
    }
    __device__ __forceinline__ u32* counter(const Segment& segment, u32 tile) const {
        return counters + segment.first_part * kTiles + tile;
    }
};

// Columns of O that a warp merges at a time, four a lane.
constexpr u32 kMergeColumns = 128;

// One row's merged columns [column, column + kMergeColumns) of a segment's sequence: kGroup warps take a split each in
// turn, then the first adds up theirs.
template <u32 kTiles, u32 kDimV>
__device__ __forceinline__ float4 merge_row(const Partials<kTiles, kDimV>& partials, const Segment& segment, u32 tile,
                                            u32 row, u32 column, u32 from, u32 step, u32 lane, RowState& total) {
    const u32 count = segment.num_parts;
    auto at = [&](u32 i) { return partials.row(segment.first_part + i, i == 0, tile) + row; };
    float top = -infinity(), sum = 0.0f;
    for (u32 i = lane; i < count; i += 32) {
        const float2 state = ld_l2(partials.states + at(i));
        const float now = fmaxf(top, state.x);
        if (now > -infinity()) sum = sum * exp2_approx(top - now) + state.y * exp2_approx(state.x - now);
        top = now;
    }
    float all = top;
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffff, all, lanes));
    if (all > -infinity()) sum *= exp2_approx(top - all);
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    total.max[0] = all, total.sum[0] = sum;
    float4 out = {};
#pragma unroll 4
    for (u32 i = from; i < count; i += step) {
        const float4 v = ld_l2(reinterpret_cast<const float4*>(partials.out + at(i) * kDimV + column) + lane);
        const float factor = all > -infinity() ? exp2_approx(ld_l2(partials.states + at(i)).x - all) : 0.0f;
        out.x += v.x * factor, out.y += v.y * factor, out.z += v.z * factor, out.w += v.w * factor;
    }
    return out;
}

}  // namespace jitgen
