// Two parts of a sequence, whose blocks are a cluster: their results meet in shared memory. Each tells the other its
// rows' maxima, which says as well that it has read all its keys; then each has half of the outputs' columns.
#pragma once
#include "jitgen/mla_merge.cuh"

namespace jitgen {

// Barriers at kBarriers count bytes that the other part sends: the first those of its maxima, [row], the second those
// of outputs, [half of the columns][warp][group of 8 columns][lane], four each, and of its rows' sums, [row].
template <class Outcome, u32 kBarriers, u32 kMaxima, u32 kSums, u32 kOutputs> struct Meeting {
    static constexpr u32 kGroups = Outcome::kHalfV / 8, kOwnGroups = kGroups / 2;  // of a half's columns
    u32 smem, rank;

    __device__ __forceinline__ u32 met() const { return smem + kBarriers; }
    __device__ __forceinline__ u32 full() const { return smem + kBarriers + 8; }
    __device__ __forceinline__ u32 max_at(u32 row) const { return smem + kMaxima + row * 4; }
    __device__ __forceinline__ u32 sum_at(u32 row) const { return smem + kSums + row * 4; }
    __device__ __forceinline__ u32 outputs() const {
        return smem + kOutputs + (threadIdx.x / 32 * (kOwnGroups * 32) + lane_index()) * 16;
    }

    // By one thread: `strips` of 16 rows come.
    __device__ __forceinline__ void expect(u32 strips) const {
        mbarrier_arrive_expect_tx(met(), strips * 16 * 4);
        mbarrier_arrive_expect_tx(full(), strips * (kOwnGroups * 2 * 512 + 16 * 4));
    }
    __device__ __forceinline__ void send_max(u32 row, float max) const { st_async(max_at(row), met(), rank ^ 1, max); }
    __device__ __forceinline__ void send_sum(u32 row, float sum) const { st_async(sum_at(row), full(), rank ^ 1, sum); }
    // The other's groups; this part's are the first kOwnGroups then.
    __device__ __forceinline__ void send(float (&out)[4 * kGroups]) const {
        constexpr u32 kOwn = 4 * kOwnGroups;
        const u32 to = outputs();
#pragma unroll
        for (u32 i = 0; i < kOwn; i += 4) {
            float other[4];
#pragma unroll
            for (u32 k = i; k < i + 4; ++k) {
                other[k - i] = rank == 0 ? out[kOwn + k] : out[k];
                out[k] = rank == 0 ? out[k] : out[kOwn + k];
            }
            st_async(to + i * 128, full(), rank ^ 1, other);
        }
    }
    // A group of this part's, with the other's.
    __device__ __forceinline__ float4 add(const float* out, u32 group) const {
        const float4 v = ld_shared_v4(outputs() + group * 512);
        return {out[0] + v.x, out[1] + v.y, out[2] + v.z, out[3] + v.w};
    }
};

}  // namespace jitgen
