// What attention kernels take of the PTX ISA beside wgmma and TMA: fragments, exponentials, 16-bit rounding, and data
// that blocks of the grid exchange through L2.
#pragma once
#include "jitgen/ptx.cuh"

namespace jitgen {

// Four 8x8 matrices of 16-bit elements, the inverse of stmatrix_x4: the A fragment of a wgmma's 16 columns.
__device__ __forceinline__ void ldmatrix_x4(u32 smem, u32* r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}

// The same, each transposed: of 8 rows of 16 bytes a lane gets rows 2 (lane % 4) and the next, columns lane / 4.
__device__ __forceinline__ void ldmatrix_x4_transposed(u32 smem, u32* r) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem)
                 : "memory");
}

// 2^x to 2 units in the last place, 0 for -inf (PTX ISA, ex2.approx.ftz).
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two float32 rounded to T, to nearest even; `low` ends up at the lower address.
template <class T> __device__ __forceinline__ u32 pack(float low, float high);
template <> __device__ __forceinline__ u32 pack<bf16>(float low, float high) { return pack_bf16(low, high); }
template <> __device__ __forceinline__ u32 pack<fp16>(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ u32 ld_global(const int* p) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ u32 ld_shared_u32(u32 smem) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(smem) : "memory");
    return v;
}
__device__ __forceinline__ uint4 ld_shared_u4(u32 smem) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(smem)
                 : "memory");
    return v;
}

// Written by other blocks of this launch: read where L2 has it, never from L1. What is not there is `other`.
__device__ __forceinline__ float2 ld_l2_if(bool is_there, const float2* p, float2 other) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p ld.global.cg.v2.f32 {%0, %1}, [%2];\n}"
                 : "+f"(other.x), "+f"(other.y)
                 : "l"(p), "r"(u32(is_there))
                 : "memory");
    return other;
}
__device__ __forceinline__ float4 ld_l2_if(bool is_there, const float4* p, float4 other) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+f"(other.x), "+f"(other.y), "+f"(other.z), "+f"(other.w)
                 : "l"(p), "r"(u32(is_there))
                 : "memory");
    return other;
}

// Adds one to a counter in global memory, behind what was written before; after `last` it is 0 again.
__device__ __forceinline__ void count_release(u32* counter, u32 last) {
    asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(counter), "r"(last) : "memory");
}

__device__ __forceinline__ void wait_at_least(const u32* counter, u32 value) {
    u32 seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < value);
}

// Barrier among `threads` threads of the block.
__device__ __forceinline__ void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jitgen
