// Online softmax of a math warpgroup's 64 rows: thread and quad hold rows g and g + 8 of a warp's 16, in the layout of
// wgmma's accumulators.
#pragma once
#include "jitgen/attention.cuh"
#include "jitgen/tma.cuh"

namespace jitgen {

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

// By which scores may exceed the maximum that p is relative to, in log2.
constexpr float kMaxSlack = 8.0f;

// Of rows g and g + 8: the largest score so far, or less by kMaxSlack at most, in units of log2, and the sum of
// 2^(score - max), this lane's share.
struct RowState {
    float max[2] = {-infinity(), -infinity()}, sum[2] = {};

    // The maximum grows to `value`; the factor that this puts on sums and outputs.
    __device__ __forceinline__ float grow(u32 row, float value) {
        // Without keys so far, both are -inf: the factor is 0, of sums that are 0.
        const float factor = exp2_approx(max[row] - (value == -infinity() ? 0.0f : value));
        max[row] = value;
        sum[row] *= factor;
        return factor;
    }
};

// Scores of keys that a row must not see, from limits[row] on, become -inf.
template <u32 kCount>
__device__ __forceinline__ void mask(float (&scores)[kCount], u32 first_key, const u32 (&limits)[2], u32 lane) {
    // Opaque, or the selections would be made whether a row has such keys or not.
    const u32 first = opaque(first_key) + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i)
        if (first + i / 4 * 8 + i % 2 >= limits[i / 2 % 2]) scores[i] = -infinity();
}

// A step of online softmax over a block of 64 keys. One warp of a scheduler is at it while the others' wait for the
// tensor core: in chains of a quarter of the elements each, so that it need not wait for itself.
struct Softening {
    float top[2];      // the rows' largest scores
    float factors[2];  // what the new maxima put on earlier results
    float base[2], sum[2][4];

    __device__ __forceinline__ void find_top(const float (&scores)[32]) {
        float chains[2][4];
#pragma unroll
        for (u32 i = 0; i < 32; ++i) {
            float& chain = chains[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
            chain = i < 8 ? scores[i] : fmaxf(chain, scores[i]);
        }
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            float value = fmaxf(fmaxf(chains[row][0], chains[row][1]), fmaxf(chains[row][2], chains[row][3]));
            value = fmaxf(value, __shfl_xor_sync(0xffffffff, value, 1));
            top[row] = fmaxf(value, __shfl_xor_sync(0xffffffff, value, 2));
        }
    }
    // Maxima that are exceeded by no more than kMaxSlack stay: outputs are hardly ever scaled then.
    __device__ __forceinline__ void grow(RowState& state, float scale) {
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            const float highest = top[row] * scale;
            factors[row] = state.grow(row, highest > state.max[row] + kMaxSlack ? highest : state.max[row]);
            base[row] = state.max[row] == -infinity() ? 0.0f : -state.max[row];
        }
    }
    // p = 2^(scale * score - max) of the k-th 16 keys, as T in the layout of wgmma's A.
    template <class T>
    __device__ __forceinline__ void exponentiate(float (&scores)[32], u32 (&p)[16], u32 k, float scale) {
#pragma unroll
        for (u32 i = 8 * k; i < 8 * k + 8; ++i) {
            scores[i] = exp2_approx(__fmaf_rn(scores[i], scale, base[i / 2 % 2]));
            float& chain = sum[i / 2 % 2][i / 4 % 2 * 2 + i % 2];
            chain = k == 0 ? scores[i] : chain + scores[i];
        }
#pragma unroll
        for (u32 i = 4 * k; i < 4 * k + 4; ++i) p[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    }
    __device__ __forceinline__ void add_sums(RowState& state) const {
#pragma unroll
        for (u32 row = 0; row < 2; ++row)
            state.sum[row] += (sum[row][0] + sum[row][1]) + (sum[row][2] + sum[row][3]);
    }
};

template <u32 kCount> __device__ __forceinline__ void rescale(float (&out)[kCount], const float (&factors)[2]) {
    // Mostly the maxima have settled. Rows that nobody asked for may hold NaN, which compares false.
    if (!__any_sync(0xffffffff, factors[0] < 1.0f || factors[1] < 1.0f)) return;
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) out[i] *= factors[i / 2 % 2];
}

// Offset of this lane's row of the fragment of columns 0 to 15 of a warp's 16 rows, in an SW128 tile of 64 columns;
// that of the columns from 16 k on has the bits 32 k flipped.
__device__ __forceinline__ u32 fragment_offset(u32 warp_row, u32 lane) {
    return swizzle<128>((warp_row + lane % 16) * 128 + lane / 16 * 16);
}

// Rows from `first` to 64 of kChunks tiles of 64 columns become zero: 0 * NaN is not. By a whole warpgroup.
template <u32 kChunks> __device__ __forceinline__ void zero_rows(u32 tiles, u32 first) {
#pragma unroll 1
    for (u32 i = first * 8 + threadIdx.x % 128; i < 64 * 8; i += 128) {
#pragma unroll
        for (u32 chunk = 0; chunk < kChunks; ++chunk) st_shared(tiles + chunk * 8192 + i * 16, float4{0, 0, 0, 0});
    }
    fence_proxy_async();
}

}  // namespace jitgen
