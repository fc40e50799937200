// wgmma of 16-bit operands, m64nNk16, accumulating in float32 registers: A from shared memory or registers, B from
// shared memory, K-major (scores = Q K^T) or N-major (output = P V: V lies in shared memory as K does).
#pragma once
#include "jitgen/wgmma.cuh"

namespace jitgen {

// Descriptors of tiles with 128-byte swizzle, 1024 bytes from one group of 8 rows to the next (stride byte offset).
// Only the low word says where: it is added to in 32 bits, in units of 16 bytes, all there is to do between wgmmas.
constexpr u32 kDescriptorHigh = (1u << 30) | (1024 >> 4);
__device__ __forceinline__ u32 descriptor_k_major(u32 smem) { return (smem & 0x3FFFF) >> 4 | 1 << 16; }
// Rows of 64 columns; `column_stride` bytes from one group of 64 columns to the next (leading byte offset).
__device__ __forceinline__ u32 descriptor_n_major(u32 smem, u32 column_stride) {
    return (smem & 0x3FFFF) >> 4 | (column_stride >> 4) << 16;
}

// Keeps registers that a wgmma reads as they are up to this point: behind the wait for it.
template <u32 kCount> __device__ __forceinline__ void keep_registers(const u32 (&a)[kCount]) {
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) asm volatile("" ::"r"(a[i]) : "memory");
}

// d = a @ b^T (+ d if accumulate) for tiles of T: a [64, 16]; b [2 * kCount, 16], or [16, 2 * kCount] if kNMajor.
template <class T, bool kNMajor, u32 kCount>
__device__ __forceinline__ void wgmma_16(float (&d)[kCount], u32 a, u32 b, bool accumulate);
template <class T, bool kNMajor, u32 kCount>
__device__ __forceinline__ void wgmma_16(float (&d)[kCount], const u32* a, u32 b, bool accumulate);

// N columns, I groups of four accumulators, then the eight placeholders behind them.
#define JITGEN_WGMMA16(T, NAME, MAJOR, N, I, P0, P1, P2, P3, P4, P5, P6, P7)                                           \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma_16<T, MAJOR, N / 2>(float (&d)[N / 2], u32 a, u32 b, bool accumulate) {      \
        asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                \
                     "mov.b64 a, {%" #P0 ", %" #P4 "};\nmov.b64 b, {%" #P1 ", %" #P4 "};\n"                            \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" JITGEN_A##I "}, a, b, p, 1"  \
                     ", 1, 0, %" #P3 ";\n}"                                                                            \
                     : JITGEN_O##I                                                                                     \
                     : "r"(a), "r"(b), "r"(u32(accumulate)), "n"(u32(MAJOR)), "n"(kDescriptorHigh));                   \
    }                                                                                                                  \
    template <>                                                                                                        \
    __device__ __forceinline__ void wgmma_16<T, MAJOR, N / 2>(float (&d)[N / 2], const u32* a, u32 b,                  \
                                                              bool accumulate) {                                       \
        asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %" #P5 ", 0;\nmov.b64 b, {%" #P4 ", %" #P7 "};\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" JITGEN_A##I "}, {%" #P0      \
                     ", %" #P1 ", %" #P2 ", %" #P3 "}, b, p, 1, 1, %" #P6 ";\n}"                                       \
                     : JITGEN_O##I                                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(u32(accumulate)), "n"(u32(MAJOR)),      \
                       "n"(kDescriptorHigh));                                                                          \
    }
#define JITGEN_WGMMA16_SHAPES(T, NAME)                                                   \
    JITGEN_WGMMA16(T, NAME, false, 16, 2, 8, 9, 10, 11, 12, 13, 14, 15)                  \
    JITGEN_WGMMA16(T, NAME, false, 32, 4, 16, 17, 18, 19, 20, 21, 22, 23)                \
    JITGEN_WGMMA16(T, NAME, false, 64, 8, 32, 33, 34, 35, 36, 37, 38, 39)                \
    JITGEN_WGMMA16(T, NAME, true, 16, 2, 8, 9, 10, 11, 12, 13, 14, 15)                   \
    JITGEN_WGMMA16(T, NAME, true, 32, 4, 16, 17, 18, 19, 20, 21, 22, 23)                 \
    JITGEN_WGMMA16(T, NAME, true, 64, 8, 32, 33, 34, 35, 36, 37, 38, 39)                 \
    JITGEN_WGMMA16(T, NAME, true, 128, 16, 64, 65, 66, 67, 68, 69, 70, 71)               \
    JITGEN_WGMMA16(T, NAME, true, 256, 32, 128, 129, 130, 131, 132, 133, 134, 135)
JITGEN_WGMMA16_SHAPES(bf16, "bf16")
JITGEN_WGMMA16_SHAPES(fp16, "f16")
#undef JITGEN_WGMMA16_SHAPES
#undef JITGEN_WGMMA16

}  // namespace jitgen
