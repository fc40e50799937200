// Split-K: blocks of a cluster that each sum a part of k of one tile exchange their sums. Every block adds up and
// stores a slice of the tile's columns.
#pragma once
#include "jitgen/mbarrier.cuh"

namespace jitgen {

// A block's inbox: from every other block, the sums of its slice, as [sender][wave][group][half][thread] of 4 sums; a
// group is 16 columns, of which a thread holds 8 sums of a wave. `barrier` counts the bytes.
template <u32 kSplitK, u32 kNumWaves, u32 kNumGroups, u32 kSliceGroups, u32 kNumThreads> struct Inbox {
    u32 smem, barrier, rank;

    __device__ __forceinline__ u32 position(u32 sender, u32 wave, u32 group, u32 half) const {
        const u32 half_group = ((sender * kNumWaves + wave) * kSliceGroups + group) * 2 + half;
        return smem + (half_group * kNumThreads + threadIdx.x) * 16;
    }

    // To be called once, by one thread: warps send only what has some of the tile's `num_rows` rows of D.
    __device__ __forceinline__ void expect(u32 num_rows) const {
        const u32 groups = min(kSliceGroups, kNumGroups - min(rank * kSliceGroups, kNumGroups));
        mbarrier_init(barrier, 1);
        mbarrier_arrive_expect_tx(barrier, (kSplitK - 1) * groups * ceil_div(num_rows, 16) * 16 * 16 * 4);
    }

    __device__ __forceinline__ bool owns(u32 group) const { return kSplitK == 1 || group / kSliceGroups == rank; }

    // Sends every other block its slice of this block's sums.
    template <u32 kCount>
    __device__ __forceinline__ void send(const float (&acc)[kNumWaves][kCount], u32 num_rows) const {
        const u32 strip = threadIdx.x / 128 * kNumWaves * 4 + threadIdx.x % 128 / 32;  // of 16 rows
#pragma unroll
        for (u32 to = 0; to < kSplitK; ++to) {
#pragma unroll
            for (u32 wave = 0; wave < kNumWaves; ++wave) {
                if (to == rank || (strip + wave * 4) * 16 >= num_rows) continue;
#pragma unroll
                for (u32 group = to * kSliceGroups; group < min((to + 1) * kSliceGroups, kNumGroups); ++group)
#pragma unroll
                    for (u32 half = 0; half < 2; ++half)
                        st_async(position(to < rank ? rank - 1 : rank, wave, group % kSliceGroups, half), barrier, to,
                                 &acc[wave][8 * group + 4 * half]);
            }
        }
    }

    __device__ __forceinline__ void wait() const { mbarrier_wait_cluster(barrier, 0); }

    // `sums` of a group plus those of the other blocks, in the order of k.
    __device__ __forceinline__ void add(float* sums, u32 wave, u32 group) const {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            float* own = sums + 4 * half;
            float4 total = {own[0], own[1], own[2], own[3]};
#pragma unroll
            for (u32 part = 0; part < kSplitK; ++part) {
                float4 v = {own[0], own[1], own[2], own[3]};
                if (part != rank) v = ld_shared_v4(position(part - (part > rank), wave, group % kSliceGroups, half));
                total = part == 0 ? v
                                  : float4{__fadd_rn(total.x, v.x), __fadd_rn(total.y, v.y), __fadd_rn(total.z, v.z),
                                           __fadd_rn(total.w, v.w)};
            }
            own[0] = total.x, own[1] = total.y, own[2] = total.z, own[3] = total.w;
        }
    }
};

}  // namespace jitgen
