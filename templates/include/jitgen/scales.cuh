// Scales: from global memory through registers to shared memory, a chunk of kBlocks K blocks at a time. (cp.async of 4
// bytes keeps shared memory busy for a clock an element, and so the tensor cores waiting.)
#pragma once
#include "jitgen/mbarrier.cuh"
#include "jitgen/wgmma.cuh"

namespace jitgen {

// Scales lie as [row][K block] in shared memory, with the halves of every other four rows of A exchanged: neither 8
// lanes that write 16 bytes each nor 8 rows of one K block meet in a bank. The rows of sfb follow, as they are.
__device__ __forceinline__ u32 scale_position(u32 row, u32 k) { return k ^ row / 4 % 2 * 4; }

// kNumThreads threads load the scales of kRows rows of A, one a thread and turn, and of kSfbRows rows of sfb.
template <u32 kRows, u32 kSfbRows, u32 kBlocks, u32 kNumThreads> struct ScaleLoader {
    const float *sfa, *sfb;
    u32 stride_m, stride_k;                  // of sfa; sfb is row-major
    u32 end_m, num_sfb_rows, num_k_blocks;   // of the tensors, or of their rows that the tile may have
    u32 sfb_row_step;                        // from one row of sfb that the tile touches to the next
    u32 thread;

    // The chunk at K block `k_base` for the tile whose rows begin at `row_m` and at `row_n` of sfb, into `smem` as soon
    // as `empty` has completed the phase of `parity`.
    __device__ __forceinline__ void load(u32 smem, u32 row_m, u32 row_n, u32 k_base, u32 empty, u32 parity) const {
        const u32 num_scales = num_k_blocks - k_base;
        const bool vectorized = num_k_blocks % 4 == 0 && k_base % 4 == 0 && stride_k == 1 && stride_m % 4 == 0 &&
                                reinterpret_cast<u64>(sfa) % 16 == 0;
        const u32 sfb_row = row_n + thread / kBlocks * sfb_row_step, sfb_k = thread % kBlocks;
        float scale_b = 0.0f;
        if (thread < kSfbRows * kBlocks && sfb_row < num_sfb_rows && sfb_k < num_scales)
            scale_b = __ldg(sfb + u64(sfb_row) * num_k_blocks + k_base + sfb_k);
#pragma unroll 1
        for (u32 row = thread; row < round_up(kRows, kNumThreads); row += kNumThreads) {
            const float* source = sfa + u64(row_m + row) * stride_m + u64(k_base) * stride_k;
            const bool valid = row < kRows && row_m + row < end_m;
            float4 scale_a[kBlocks / 4] = {};
            if (valid && vectorized) {
#pragma unroll
                for (u32 i = 0; i < kBlocks / 4; ++i)
                    if (4 * i < num_scales) scale_a[i] = __ldg(reinterpret_cast<const float4*>(source) + i);
            } else if (valid) {
#pragma unroll
                for (u32 k = 0; k < kBlocks; ++k, source += stride_k)
                    if (k < num_scales) reinterpret_cast<float*>(scale_a)[k] = __ldg(source);
            }
            if (row == thread) {  // the first loads are under way before the stage is free
                mbarrier_wait(empty, parity);
                if (thread < kSfbRows * kBlocks) st_shared(smem + (kRows * kBlocks + thread) * 4, scale_b);
            }
#pragma unroll
            for (u32 i = 0; i < kBlocks / 4; ++i)
                if (row < kRows) st_shared(smem + (row * kBlocks + scale_position(row, 4 * i)) * 4, scale_a[i]);
        }
    }
};

// The scales of a math thread's accumulators, from a stage of the scales' pipeline. Those of a wgmma chain (`slice` of
// `wave` of K block `block` from `chunk_block` on) are prefetched while the chain before it is promoted, and prepared
// while it runs. `boundary`: columns of the tile from here on take the second row of sfb.
template <bool kSwapAB, u32 kBlockM, u32 kPartColumns, u32 kSfbRows, u32 kBlocks> struct ThreadScales {
    u32 smem_m, smem_n, boundary;
    float scale_m[2], scale_n[kSfbRows], scale[kSfbRows][2];

    __device__ __forceinline__ ThreadScales(u32 smem, u32 chunk_block, u32 row, u32 lane, u32 boundary)
        : smem_m(smem + (row * kBlocks + scale_position(row, chunk_block)) * 4),
          smem_n(smem + (kBlockM * kBlocks + chunk_block) * 4), boundary(boundary) {}

    __device__ __forceinline__ void prefetch(u32 block, u32 wave, u32 slice) {
        if (slice != 0) return;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) scale_m[i] = ld_shared(smem_m + ((wave * 64 + i * 8) * kBlocks + block) * 4);
        if (wave != 0) return;
#pragma unroll
        for (u32 i = 0; i < kSfbRows; ++i) scale_n[i] = ld_shared(smem_n + (i * kBlocks + block) * 4);
    }

    __device__ __forceinline__ void prepare(u32 block, u32 wave, u32 slice) {
        if (slice != 0) return;
#pragma unroll
        for (u32 i = 0; i < kSfbRows * 2; ++i) scale[i / 2][i % 2] = __fmul_rn(scale_m[i % 2], scale_n[i / 2]);
    }

    // Of the thread's accumulator `i` in the chain.
    __device__ __forceinline__ float of(u32 slice, u32 i) const {
        const bool last = kSfbRows > 1 && (slice * kPartColumns + i / 4 * 8) / 16 * 16 >= boundary;
        return last ? scale[kSfbRows - 1][i / 2 % 2] : scale[0][i / 2 % 2];
    }
};

// If A and B are swapped, the accumulators of a thread lie in kPartColumns / 4 rows of A, and those of a wave under one
// scale of B.
template <u32 kBlockM, u32 kPartColumns, u32 kSfbRows, u32 kBlocks>
struct ThreadScales<true, kBlockM, kPartColumns, kSfbRows, kBlocks> {
    u32 smem_m, smem_n, row, boundary;
    float scale[kPartColumns / 4];

    __device__ __forceinline__ ThreadScales(u32 smem, u32 chunk_block, u32 row, u32 lane, u32 boundary)
        : smem_m(smem + (lane % 4 * 2 * kBlocks + scale_position(lane % 4 * 2, chunk_block)) * 4),
          smem_n(smem + (kBlockM * kBlocks + chunk_block) * 4), row(row), boundary(boundary) {}

    __device__ __forceinline__ void prefetch(u32 block, u32 wave, u32 slice) {}

    __device__ __forceinline__ void prepare(u32 block, u32 wave, u32 slice) {
        const u32 last = kSfbRows > 1 && row + wave * 64 >= boundary;
        const float scale_n = ld_shared(smem_n + (last * kBlocks + block) * 4);
#pragma unroll
        for (u32 i = 0; i < kPartColumns / 4; ++i) {
            const u32 row_m = slice * kPartColumns + i / 2 * 8 + i % 2;
            scale[i] = __fmul_rn(ld_shared(smem_m + (row_m * kBlocks + block) * 4), scale_n);
        }
    }

    __device__ __forceinline__ float of(u32 slice, u32 i) const { return scale[i / 4 * 2 + i % 2]; }
};

// Where every row of B has scales of its own, as those of A have: both lie as [K block][row], rows of A first. Of every
// 16 rows, those come together that a thread scales as columns of wgmma's: rows 2i, 2i + 1, 2i + 8 and 2i + 9.
constexpr u32 kScaleRows = 16;
__device__ __forceinline__ u32 row_scale_position(u32 row) {
    return row / kScaleRows * kScaleRows + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

// Scales of an operand's rows, of which it has `num_rows`.
struct RowScales {
    const float* scales;
    u32 stride_row, stride_k, num_rows;
};

// kBlocks floats from `source` on, 0 for those from `count` on, by aligned loads of 16 bytes: of the scales of 32 rows, in
// memory far from each other, a load of one each takes the time of a load of four. What comes before `source` is loaded
// with it, and lies within its allocation, which is aligned to more.
template <u32 kBlocks>
__device__ __forceinline__ void load_neighbours(float (&values)[kBlocks], const float* source, u32 count) {
    const u32 offset = reinterpret_cast<u64>(source) / 4 % 4, end = offset + min(count, kBlocks);
    float wide[kBlocks + 4] = {};
#pragma unroll
    for (u32 i = 0; i < kBlocks + 4; i += 4) {
        const float* aligned = source + i - offset;
        if (i < end && i + 4 <= offset + count) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(aligned));
            wide[i] = four.x, wide[i + 1] = four.y, wide[i + 2] = four.z, wide[i + 3] = four.w;
        } else {
#pragma unroll
            for (u32 j = 0; j < 4; ++j)
                if (offset <= i + j && i + j < end) wide[i + j] = __ldg(aligned + j);
        }
    }
#pragma unroll
    for (u32 step = 1; step <= 2; ++step)
#pragma unroll
        for (u32 i = 0; i < kBlocks + 4 - step; ++i) wide[i] = offset & step ? wide[i + step] : wide[i];
#pragma unroll
    for (u32 i = 0; i < kBlocks; ++i) values[i] = wide[i];
}

// kNumThreads threads load the scales of a tile's rows of A and of B, one row a thread and turn, of some turns at once.
template <u32 kBlockM, u32 kBlockN, u32 kBlocks, u32 kNumThreads> struct RowScaleLoader {
    static constexpr u32 kRows = kBlockM + kBlockN, kTurns = ceil_div(kRows, kNumThreads);
    static constexpr u32 kTurnsAtOnce = kTurns < 2 ? kTurns : 2;  // kBlocks registers each
    RowScales a, b;
    u32 end_k;  // in K blocks
    u32 thread;

    // The chunk at K block `k_base` for the tile at row `row_m` of A and `row_n` of B, as ScaleLoader's.
    __device__ __forceinline__ void load(u32 smem, u32 row_m, u32 row_n, u32 k_base, u32 empty, u32 parity) const {
        const u32 first_row = opaque(thread);  // or what follows from it would be kept from chunk to chunk, and spill
#pragma unroll 1
        for (u32 turn = 0; turn < kTurns; turn += kTurnsAtOnce) {
            float scale[kTurnsAtOnce][kBlocks];
#pragma unroll
            for (u32 i = 0; i < kTurnsAtOnce; ++i) {
                const u32 row = first_row + (turn + i) * kNumThreads;
                const bool is_a = row < kBlockM;
                const u32 index = is_a ? row_m + row : row_n + row - kBlockM, stride_k = is_a ? a.stride_k : b.stride_k;
                const float* source = (is_a ? a.scales : b.scales) + u64(index) * (is_a ? a.stride_row : b.stride_row) +
                                      u64(k_base) * stride_k;
                const bool valid = row < kRows && index < (is_a ? a.num_rows : b.num_rows);
                const u32 count = valid ? end_k - k_base : 0;
                if (stride_k == 1) {
                    load_neighbours(scale[i], source, count);
                } else {
#pragma unroll
                    for (u32 k = 0; k < kBlocks; ++k, source += stride_k) scale[i][k] = k < count ? __ldg(source) : 0.0f;
                }
            }
            if (turn == 0) mbarrier_wait(empty, parity);  // the first loads are under way before the stage is free
#pragma unroll
            for (u32 i = 0; i < kTurnsAtOnce; ++i) {
                const u32 row = first_row + (turn + i) * kNumThreads;
#pragma unroll
                for (u32 k = 0; k < kBlocks; ++k)
                    if (row < kRows) st_shared(smem + (k * kRows + row_scale_position(row)) * 4, scale[i][k]);
            }
        }
    }
};

// As ThreadScales: every accumulator of a thread has a scale of its row of wgmma's and one of its column. The products for
// the first kAhead accumulators of a chain are formed while it runs. For the others those of columns are read while
// accumulators are promoted, four at a time: they must be asked for in order.
template <bool kSwapAB, u32 kBlockM, u32 kBlockN, u32 kPartColumns, u32 kAhead> struct ThreadRowScales {
    static constexpr u32 kBlockBytes = (kBlockM + kBlockN) * 4;
    static_assert(kAhead > 0 && kAhead % 8 == 0, "scales of 16 columns are read together, for 8 accumulators");
    u32 smem_rows, smem_columns, part_columns;
    float next_rows[2], rows[2], products[kAhead];
    float4 columns, next_columns;

    // `row`: the thread's first row of wgmma's, one of the first 8 of 16.
    __device__ __forceinline__ ThreadRowScales(u32 smem, u32 chunk_block, u32 row, u32 lane)
        : smem_rows(smem + chunk_block * kBlockBytes + ((kSwapAB ? kBlockM : 0) + row_scale_position(row)) * 4),
          smem_columns(smem + chunk_block * kBlockBytes + ((kSwapAB ? 0 : kBlockM) + lane % 4 * 4) * 4) {}

    __device__ __forceinline__ void prefetch(u32 block, u32 wave, u32 slice) {
        if (slice != 0) return;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) next_rows[i] = ld_shared(smem_rows + block * kBlockBytes + (wave * 64 + i * 2) * 4);
    }

    __device__ __forceinline__ void prepare(u32 block, u32 wave, u32 slice) {
        if (slice == 0) rows[0] = next_rows[0], rows[1] = next_rows[1];
        part_columns = smem_columns + block * kBlockBytes + slice * kPartColumns * 4;
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i) {
            if (i % 8 == 0) columns = ld_shared_v4(part_columns + i * 8);
            products[i] = product(i);
        }
        pin_registers(products);  // here, and not behind the wait for the chain
        if (kAhead < kPartColumns / 2) next_columns = ld_shared_v4(part_columns + kAhead * 8);
    }

    __device__ __forceinline__ float of(u32 slice, u32 i) {
        if (i < kAhead) return products[i];
        if (i % 8 == 0) {
            columns = next_columns;
            if (i + 8 < kPartColumns / 2) next_columns = ld_shared_v4(part_columns + (i + 8) * 8);
        }
        return product(i);
    }

    __device__ __forceinline__ float product(u32 i) const {
        const float column = i / 4 % 2 ? (i % 2 ? columns.w : columns.z) : (i % 2 ? columns.y : columns.x);
        return __fmul_rn(rows[i / 2 % 2], column);
    }
};

}  // namespace jitgen
