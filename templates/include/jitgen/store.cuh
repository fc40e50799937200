// Tiles of D on their way out, through shared memory that is swizzled as TMA stores it.
#pragma once
#include "jitgen/tma.cuh"

namespace jitgen {

// Writes a warp's 16 rows x 16 columns of sums, out[column group of 8][row, row + 8] of each thread, rounded to T, to
// row `row` and column `column` of the box at `smem`.
template <u32 kSpan, class T>
__device__ __forceinline__ void write_fragment(u32 smem, u32 row, u32 column, u32 lane, const float2 (&out)[2][2]) {
    if constexpr (sizeof(T) == 2) {
        const u32 offset = (row + lane % 16) * kSpan + (column + lane / 16 * 8) * 2;
        stmatrix_x4(smem + swizzle<kSpan>(offset), pack_bf16(out[0][0].x, out[0][0].y),
                    pack_bf16(out[0][1].x, out[0][1].y), pack_bf16(out[1][0].x, out[1][0].y),
                    pack_bf16(out[1][1].x, out[1][1].y));
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 offset = (row + lane / 4 + i % 2 * 8) * kSpan + (column + i / 2 * 8 + lane % 4 * 2) * 4;
            st_shared(smem + swizzle<kSpan>(offset), out[i / 2][i % 2]);
        }
    }
}

// Writes to `d`, at row `first` and column `column`, those of `num_rows` rows of a warpgroup's tile of kRows x kColumns
// that are of `group`, by `group_of_row` if given; a thread moves 16 bytes at a time.
template <u32 kRows, u32 kColumns, u32 kSpan, class T>
__device__ __forceinline__ void store_rows(T* d, u64 stride, u32 smem, u32 first, u32 num_rows, u32 column,
                                           u32 num_columns, const int* group_of_row, u32 group) {
    constexpr u32 kChunk = 16 / sizeof(T), kRowChunks = kColumns / kChunk;
#pragma unroll 1
    for (u32 i = threadIdx.x % 128; i < num_rows * kRowChunks; i += 128) {
        const u32 row = i / kRowChunks, offset = i % kRowChunks * 16;
        if (offset / sizeof(T) >= num_columns || (group_of_row && __ldg(group_of_row + first + row) != int(group)))
            continue;
        const u32 box = smem + offset / kSpan * kRows * kSpan;
        const float4 chunk = ld_shared_v4(box + swizzle<kSpan>(row * kSpan + offset % kSpan));
        *reinterpret_cast<float4*>(d + (first + row) * stride + column + offset / sizeof(T)) = chunk;
    }
}

}  // namespace jitgen
