// Thin wrappers of the PTX that the kernels use, named after the instructions (PTX ISA 9.0).
#pragma once
#include "jitgen/types.cuh"

namespace jitgen {

__device__ __forceinline__ u32 smem_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ u32 lane_index() {
    u32 lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// `value`, of which the compiler then knows nothing.
__device__ __forceinline__ u32 opaque(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

__device__ __forceinline__ bool elect_one() {
    u32 elected;
    asm volatile(
        "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// Registers a thread: raises block until the pool has them, so the other warpgroups must lower theirs.
template <u32 kRegisters> __device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <u32 kRegisters> __device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier among `kThreads` threads of the block; id 0 is __syncthreads.
template <u32 kThreads> __device__ __forceinline__ void named_barrier_sync(u32 id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Counts this warp in, without waiting.
template <u32 kThreads> __device__ __forceinline__ void named_barrier_arrive(u32 id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Programmatic dependent launch, nothing without it: waits for the results of the kernels before; lets the next one begin.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Orders ordinary shared-memory accesses before those of the async proxy (wgmma, TMA).
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Volatile: read again where it is needed, it does not hold a register meanwhile.
__device__ __forceinline__ u32 block_index() {
    u32 index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The blocks of a cluster meet: what they have to see of each other by then are mbarriers, behind fence_mbarrier_init.
// (An arrival with release would be a fence of the whole GPU by every thread, 0.7 us.)
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements: a warp stores 16 rows x 16 columns, lane l giving the address of row l % 16
// in column group l / 16.
__device__ __forceinline__ void stmatrix_x4(u32 smem, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}

__device__ __forceinline__ void st_shared(u32 smem, u32 v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem), "r"(v) : "memory");
}
__device__ __forceinline__ void st_shared(u32 smem, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(smem), "f"(v) : "memory");
}
__device__ __forceinline__ void st_shared(u32 smem, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}
__device__ __forceinline__ void st_shared(u32 smem, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(smem), "f"(v.x), "f"(v.y) : "memory");
}

__device__ __forceinline__ void st_shared(u32 smem, u16 v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(smem), "h"(v) : "memory");
}

// Stores into the shared memory of block `rank` of the cluster, at the same offset; its barrier counts the bytes.
__device__ __forceinline__ void st_async(u32 smem, u32 barrier, u32 rank, const float* v) {
    asm volatile(
        "{\n.reg .b32 to, bar;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 bar, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [bar];\n}" ::"r"(smem),
        "r"(barrier), "r"(rank), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
        : "memory");
}

__device__ __forceinline__ void st_async(u32 smem, u32 barrier, u32 rank, float v) {
    asm volatile(
        "{\n.reg .b32 to, bar;\nmapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 bar, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %3, [bar];\n}" ::"r"(smem),
        "r"(barrier), "r"(rank), "f"(v)
        : "memory");
}

__device__ __forceinline__ float4 ld_shared_v4(u32 smem) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(smem)
                 : "memory");
    return v;
}
__device__ __forceinline__ float ld_shared(u32 smem) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(smem) : "memory");
    return v;
}

// Two float32 rounded to bf16, to nearest even; `low` ends up at the lower address.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}


// Two float32 rounded to e4m3, to nearest even, those too large to +-448; `low` ends up at the lower address.
__device__ __forceinline__ u16 pack_e4m3(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

}  // namespace jitgen
