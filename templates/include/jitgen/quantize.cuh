// D in E4M3 with a scale a 1x128 block: the device side of jitgen.numerics.quantize_rows.
#pragma once
#include "jitgen/epilogue.cuh"
#include "jitgen/tma.cuh"

namespace jitgen {

constexpr u32 kQuantizeColumns = 128;

struct BlockScale {
    float scale, inverse;
};

// The scale of a block whose largest magnitude is `amax`, and what its values are multiplied with.
template <bool kPowerOfTwo> __device__ __forceinline__ BlockScale block_scale(float amax) {
    amax = epilogue::maximum(amax, 0x1.cp-55f);  // 448 * 2^-63
    float scale = __fdiv_rn(amax, 448.0f);
    if constexpr (!kPowerOfTwo) return {scale, __fdiv_rn(448.0f, amax)};
    const u32 bits = __float_as_uint(scale);
    if (bits < 0x7f800000) scale = __uint_as_float((bits + 0x7fffff) & 0x7f800000);
    return {scale, __fdiv_rn(1.0f, scale)};
}

// Quantizes a warp's 16 rows x kColumns of values, as wgmma leaves sums, into a warpgroup's tile of kRows rows at
// `smem`, from its row `row` on. Scales go to scales[0] and scales[1], of this thread's row and the one 8 below, or,
// where that is null, nowhere.
template <u32 kRows, u32 kColumns, bool kPowerOfTwo, u32 kCount>
__device__ __forceinline__ void quantize(const float (&values)[kCount], u32 smem, u32 row, u32 lane,
                                         float* const (&scales)[2]) {
#pragma unroll
    for (u32 block = 0; block < kColumns / kQuantizeColumns; ++block) {
        const float* v = values + block * (kQuantizeColumns / 2);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {  // rows 0..7 of the 16, then 8..15
            float amax = 0.0f;
#pragma unroll
            for (u32 i = 2 * half; i < kQuantizeColumns / 2; i += 4)
                amax = epilogue::maximum(epilogue::maximum(amax, fabsf(v[i])), fabsf(v[i + 1]));
#pragma unroll
            for (u32 step = 1; step < 4; step *= 2)  // the four threads that share a row
                amax = epilogue::maximum(amax, __shfl_xor_sync(0xffffffff, amax, step));
            const BlockScale by = block_scale<kPowerOfTwo>(amax);
            if (lane % 4 == 0 && scales[half]) scales[half][block] = by.scale;
            const u32 box = smem + block * kRows * kQuantizeColumns;
#pragma unroll
            for (u32 i = 2 * half; i < kQuantizeColumns / 2; i += 4) {
                const u32 offset = (row + lane / 4 + half * 8) * kQuantizeColumns + i / 4 * 8 + lane % 4 * 2;
                st_shared(box + swizzle<kQuantizeColumns>(offset),
                          pack_e4m3(__fmul_rn(v[i], by.inverse), __fmul_rn(v[i + 1], by.inverse)));
            }
        }
    }
}

}  // namespace jitgen
