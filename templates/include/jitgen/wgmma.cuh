// wgmma: warpgroup matrix multiply of FP8 tiles in shared memory, m64nNk32, accumulating in registers.
#pragma once
#include "jitgen/ptx.cuh"

namespace jitgen {

// Shared-memory matrix descriptor of a K-major tile with 128-byte swizzle: address, leading byte offset (unused
// with a swizzle: 1), stride of 1024 bytes between groups of 8 rows, layout 1 = SWIZZLE_128B; all in units of 16.
__device__ __forceinline__ u64 wgmma_descriptor(u32 smem) {
    return u64((smem & 0x3FFFF) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 kPending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins accumulators: the compiler must neither move nor copy them across this point (before wgmma_fence and after
// wgmma_wait; otherwise ptxas serializes the wgmmas).
template <u32 kCount> __device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
    for (u32 i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a @ b^T (+ d if accumulate), for E4M3 descriptors a [64, 32] and b [2 * kCount, 32].
template <u32 kCount> __device__ __forceinline__ void wgmma_e4m3(float (&d)[kCount], u64 a, u64 b, bool accumulate);

// Register lists of the instantiations below: JITGEN_Pi names placeholders 4i..4i+3, JITGEN_Ai lists all up to
// them, JITGEN_Oi binds the accumulators to them.
#define JITGEN_D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JITGEN_A1 "%0, %1, %2, %3"
#define JITGEN_A2 JITGEN_A1 ", %4, %5, %6, %7"
#define JITGEN_A3 JITGEN_A2 ", %8, %9, %10, %11"
#define JITGEN_A4 JITGEN_A3 ", %12, %13, %14, %15"
#define JITGEN_A5 JITGEN_A4 ", %16, %17, %18, %19"
#define JITGEN_A6 JITGEN_A5 ", %20, %21, %22, %23"
#define JITGEN_A7 JITGEN_A6 ", %24, %25, %26, %27"
#define JITGEN_A8 JITGEN_A7 ", %28, %29, %30, %31"
#define JITGEN_A9 JITGEN_A8 ", %32, %33, %34, %35"
#define JITGEN_A10 JITGEN_A9 ", %36, %37, %38, %39"
#define JITGEN_A11 JITGEN_A10 ", %40, %41, %42, %43"
#define JITGEN_A12 JITGEN_A11 ", %44, %45, %46, %47"
#define JITGEN_A13 JITGEN_A12 ", %48, %49, %50, %51"
#define JITGEN_A14 JITGEN_A13 ", %52, %53, %54, %55"
#define JITGEN_A15 JITGEN_A14 ", %56, %57, %58, %59"
#define JITGEN_A16 JITGEN_A15 ", %60, %61, %62, %63"
#define JITGEN_A17 JITGEN_A16 ", %64, %65, %66, %67"
#define JITGEN_A18 JITGEN_A17 ", %68, %69, %70, %71"
#define JITGEN_A19 JITGEN_A18 ", %72, %73, %74, %75"
#define JITGEN_A20 JITGEN_A19 ", %76, %77, %78, %79"
#define JITGEN_A21 JITGEN_A20 ", %80, %81, %82, %83"
#define JITGEN_A22 JITGEN_A21 ", %84, %85, %86, %87"
#define JITGEN_A23 JITGEN_A22 ", %88, %89, %90, %91"
#define JITGEN_A24 JITGEN_A23 ", %92, %93, %94, %95"
#define JITGEN_A25 JITGEN_A24 ", %96, %97, %98, %99"
#define JITGEN_A26 JITGEN_A25 ", %100, %101, %102, %103"
#define JITGEN_A27 JITGEN_A26 ", %104, %105, %106, %107"
#define JITGEN_A28 JITGEN_A27 ", %108, %109, %110, %111"
#define JITGEN_A29 JITGEN_A28 ", %112, %113, %114, %115"
#define JITGEN_A30 JITGEN_A29 ", %116, %117, %118, %119"
#define JITGEN_A31 JITGEN_A30 ", %120, %121, %122, %123"
#define JITGEN_A32 JITGEN_A31 ", %124, %125, %126, %127"
#define JITGEN_O1 JITGEN_D(0)
#define JITGEN_O2 JITGEN_O1, JITGEN_D(4)
#define JITGEN_O3 JITGEN_O2, JITGEN_D(8)
#define JITGEN_O4 JITGEN_O3, JITGEN_D(12)
#define JITGEN_O5 JITGEN_O4, JITGEN_D(16)
#define JITGEN_O6 JITGEN_O5, JITGEN_D(20)
#define JITGEN_O7 JITGEN_O6, JITGEN_D(24)
#define JITGEN_O8 JITGEN_O7, JITGEN_D(28)
#define JITGEN_O9 JITGEN_O8, JITGEN_D(32)
#define JITGEN_O10 JITGEN_O9, JITGEN_D(36)
#define JITGEN_O11 JITGEN_O10, JITGEN_D(40)
#define JITGEN_O12 JITGEN_O11, JITGEN_D(44)
#define JITGEN_O13 JITGEN_O12, JITGEN_D(48)
#define JITGEN_O14 JITGEN_O13, JITGEN_D(52)
#define JITGEN_O15 JITGEN_O14, JITGEN_D(56)
#define JITGEN_O16 JITGEN_O15, JITGEN_D(60)
#define JITGEN_O17 JITGEN_O16, JITGEN_D(64)
#define JITGEN_O18 JITGEN_O17, JITGEN_D(68)
#define JITGEN_O19 JITGEN_O18, JITGEN_D(72)
#define JITGEN_O20 JITGEN_O19, JITGEN_D(76)
#define JITGEN_O21 JITGEN_O20, JITGEN_D(80)
#define JITGEN_O22 JITGEN_O21, JITGEN_D(84)
#define JITGEN_O23 JITGEN_O22, JITGEN_D(88)
#define JITGEN_O24 JITGEN_O23, JITGEN_D(92)
#define JITGEN_O25 JITGEN_O24, JITGEN_D(96)
#define JITGEN_O26 JITGEN_O25, JITGEN_D(100)
#define JITGEN_O27 JITGEN_O26, JITGEN_D(104)
#define JITGEN_O28 JITGEN_O27, JITGEN_D(108)
#define JITGEN_O29 JITGEN_O28, JITGEN_D(112)
#define JITGEN_O30 JITGEN_O29, JITGEN_D(116)
#define JITGEN_O31 JITGEN_O30, JITGEN_D(120)
#define JITGEN_O32 JITGEN_O31, JITGEN_D(124)

// N columns, I groups of four accumulators, then the placeholders of a, b and the predicate (numbers 4I, 4I+1, 4I+2).
#define JITGEN_WGMMA(N, I, A, B, P)                                                                        \
    template <> __device__ __forceinline__ void wgmma_e4m3<N / 2>(float (&d)[N / 2], u64 a, u64 b, bool accumulate) { \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" JITGEN_A##I "}, %" #A ", %" #B \
                     ", p, 1, 1;\n}"                                                                        \
                     : JITGEN_O##I                                                                          \
                     : "l"(a), "l"(b), "r"(u32(accumulate)));                                               \
    }
JITGEN_WGMMA(8, 1, 4, 5, 6)
JITGEN_WGMMA(16, 2, 8, 9, 10)
JITGEN_WGMMA(24, 3, 12, 13, 14)
JITGEN_WGMMA(32, 4, 16, 17, 18)
JITGEN_WGMMA(40, 5, 20, 21, 22)
JITGEN_WGMMA(48, 6, 24, 25, 26)
JITGEN_WGMMA(56, 7, 28, 29, 30)
JITGEN_WGMMA(64, 8, 32, 33, 34)
JITGEN_WGMMA(72, 9, 36, 37, 38)
JITGEN_WGMMA(80, 10, 40, 41, 42)
JITGEN_WGMMA(88, 11, 44, 45, 46)
JITGEN_WGMMA(96, 12, 48, 49, 50)
JITGEN_WGMMA(104, 13, 52, 53, 54)
JITGEN_WGMMA(112, 14, 56, 57, 58)
JITGEN_WGMMA(120, 15, 60, 61, 62)
JITGEN_WGMMA(128, 16, 64, 65, 66)
JITGEN_WGMMA(136, 17, 68, 69, 70)
JITGEN_WGMMA(144, 18, 72, 73, 74)
JITGEN_WGMMA(152, 19, 76, 77, 78)
JITGEN_WGMMA(160, 20, 80, 81, 82)
JITGEN_WGMMA(168, 21, 84, 85, 86)
JITGEN_WGMMA(176, 22, 88, 89, 90)
JITGEN_WGMMA(184, 23, 92, 93, 94)
JITGEN_WGMMA(192, 24, 96, 97, 98)
JITGEN_WGMMA(200, 25, 100, 101, 102)
JITGEN_WGMMA(208, 26, 104, 105, 106)
JITGEN_WGMMA(216, 27, 108, 109, 110)
JITGEN_WGMMA(224, 28, 112, 113, 114)
JITGEN_WGMMA(232, 29, 116, 117, 118)
JITGEN_WGMMA(240, 30, 120, 121, 122)
JITGEN_WGMMA(248, 31, 124, 125, 126)
JITGEN_WGMMA(256, 32, 128, 129, 130)

#undef JITGEN_WGMMA

}  // namespace jitgen
