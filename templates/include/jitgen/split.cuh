// Split-K: blocks of a cluster that each sum a part of k of one tile exchange their sums. Every block adds up and
// stores a slice of the tile's columns.
#pragma once
#include "jitgen/mbarrier.cuh"

namespace jitgen {

// A block's inbox: from every other block, the sums of its slice, as [sender][wave][group][thread] of 4 sums; a group is
// 8 columns of wgmma's, of which a thread holds 4 sums of a wave. `barrier` counts the bytes. Only what lies within D is
// sent: `num_rows` of the tile's rows do, which are rows of wgmma's or, if A and B are swapped, its columns.
template <u32 kSplitK, bool kSwapAB, u32 kNumWaves, u32 kColumns, u32 kSliceColumns, u32 kNumThreads> struct Inbox {
    static constexpr u32 kNumGroups = kColumns / 8, kSliceGroups = kSliceColumns / 8;
    u32 smem, barrier, rank;

    __device__ __forceinline__ u32 position(u32 sender, u32 wave, u32 group) const {
        return smem + (((sender * kNumWaves + wave) * kSliceGroups + group % kSliceGroups) * kNumThreads + threadIdx.x) * 16;
    }

    // To be called once, by one thread.
    __device__ __forceinline__ void expect(u32 num_rows) const {
        const u32 groups = kSwapAB ? min(kNumGroups, ceil_div(num_rows, 8)) : kNumGroups;
        const u32 own = min(kSliceGroups, groups - min(rank * kSliceGroups, groups));
        const u32 max_strips = kNumWaves * kNumThreads / 32;  // of a warp's 16 rows
        const u32 strips = kSwapAB ? max_strips : min(max_strips, ceil_div(num_rows, 16));
        mbarrier_init(barrier, 1);
        mbarrier_arrive_expect_tx(barrier, (kSplitK - 1) * own * strips * 32 * 16);
    }

    __device__ __forceinline__ bool owns(u32 column) const { return kSplitK == 1 || column / kSliceColumns == rank; }

    // Sends every other block its slice of this block's sums.
    template <u32 kCount>
    __device__ __forceinline__ void send(const float (&acc)[kNumWaves][kCount], u32 num_rows) const {
        const u32 strip = threadIdx.x / 128 * kNumWaves * 4 + threadIdx.x % 128 / 32;
#pragma unroll
        for (u32 to = 0; to < kSplitK; ++to) {
#pragma unroll
            for (u32 wave = 0; wave < kNumWaves; ++wave) {
                if (to == rank || (!kSwapAB && (strip + wave * 4) * 16 >= num_rows)) continue;
#pragma unroll
                for (u32 group = to * kSliceGroups; group < min((to + 1) * kSliceGroups, kNumGroups); ++group)
                    if (!kSwapAB || group * 8 < num_rows)
                        st_async(position(to < rank ? rank - 1 : rank, wave, group), barrier, to, &acc[wave][4 * group]);
            }
        }
    }

    __device__ __forceinline__ void wait() const { mbarrier_wait_cluster(barrier, 0); }

    // The 4 sums of a group plus those of the other blocks, in the order of k.
    __device__ __forceinline__ void add(float* sums, u32 wave, u32 group) const {
        const float4 own = {sums[0], sums[1], sums[2], sums[3]};
        float4 total = own;
#pragma unroll
        for (u32 part = 0; part < kSplitK; ++part) {
            float4 v = own;
            if (part != rank) v = ld_shared_v4(position(part - (part > rank), wave, group));
            total = part == 0 ? v
                              : float4{__fadd_rn(total.x, v.x), __fadd_rn(total.y, v.y), __fadd_rn(total.z, v.z),
                                       __fadd_rn(total.w, v.w)};
        }
        sums[0] = total.x, sums[1] = total.y, sums[2] = total.z, sums[3] = total.w;
    }
};

}  // namespace jitgen
