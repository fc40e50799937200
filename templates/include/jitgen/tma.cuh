// The tensor memory accelerator: 2-D tile loads, multicast loads, stores and sums (PTX ISA, cp.async.bulk.tensor).
#pragma once
#include "jitgen/ptx.cuh"

namespace jitgen {

__device__ __forceinline__ void tma_prefetch_descriptor(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the box at (x, y), x along the contiguous dimension; with kMulticast to every block in `mask`.
template <bool kMulticast>
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 barrier, u32 x, u32 y, u16 mask) {
    if constexpr (kMulticast) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem),
            "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(mask)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4}], [%2];" ::"r"(smem),
            "l"(&map), "r"(barrier), "r"(x), "r"(y)
            : "memory");
    }
}

// As tma_load; if the lines are `read_once`, they are the first to leave L2. (The policy evict_normal for the others is
// not what a load without a policy gets: it made large GEMMs 1.4 times slower on an H100.)
template <bool kMulticast>
__device__ __forceinline__ void tma_load(u32 smem, const TensorMap& map, u32 barrier, u32 x, u32 y, u16 mask,
                                         bool read_once) {
    if (!read_once) return tma_load<kMulticast>(smem, map, barrier, x, y, mask);
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    if constexpr (kMulticast) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(smem),
            "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(mask), "l"(policy)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem),
            "l"(&map), "r"(barrier), "r"(x), "r"(y), "l"(policy)
            : "memory");
    }
}

// Stores the box at (x, y); what lies beyond the tensor's end is dropped.
__device__ __forceinline__ void tma_store(const TensorMap& map, u32 smem, u32 x, u32 y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(smem),
                 "r"(x), "r"(y)
                 : "memory");
}

// Stores the box at (x, y) of matrix `z`.
__device__ __forceinline__ void tma_store(const TensorMap& map, u32 smem, u32 x, u32 y, u32 z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(smem), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Adds the float32 box to what is at (x, y) of matrix `z`, in L2.
__device__ __forceinline__ void tma_reduce_add(const TensorMap& map, u32 smem, u32 x, u32 y, u32 z) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];"
                 ::"l"(&map), "r"(smem), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read their shared memory, which may then be written again, or given up.
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// The byte offset at which a TMA tile with a swizzle span of kSpan bytes holds its byte `offset`: 16-byte chunks
// are permuted within the span by the row's index in units of 128 bytes.
template <u32 kSpan> __device__ __forceinline__ u32 swizzle(u32 offset) {
    static_assert(kSpan == 128 || kSpan == 64 || kSpan == 32, "TMA swizzles spans of 128, 64 or 32 bytes");
    return offset ^ ((offset >> 7) % (kSpan / 16)) << 4;
}

}  // namespace jitgen
