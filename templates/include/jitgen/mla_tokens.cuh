// Tokens of an FP8 cache: 512 E4M3 codes, a float32 scale for each 128 of them, then 64 BF16 elements. What a warp of the
// producer does to have 16 tokens of a block of keys in shared memory as BF16, in tiles as TMA would leave them.
#pragma once
#include "jitgen/attention.cuh"
#include "jitgen/mbarrier.cuh"
#include "jitgen/tma.cuh"

namespace jitgen {

constexpr u32 kTokenBytes = 656, kScalesAt = 512, kTailAt = 528;
constexpr u32 kTokenChunkBytes = 64 * 128;  // of a tile: 64 tokens, 64 columns

// Read once: past L1.
__device__ __forceinline__ uint4 ld_stream(const u8* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ float ld_stream_float(const u8* p) {
    float v;
    asm volatile("ld.global.L1::no_allocate.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

// 16 bytes to shared memory, zeros if `bytes` is 0 instead of 16.
__device__ __forceinline__ void cp_async_16(u32 smem, const u8* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void prefetch_l2(const u8* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 2^120 * scale as the sum of two bf16, to 16 bits: the larger one in the low half.
__device__ __forceinline__ u32 split_scale(float scale) {
    const float scaled = scale * 0x1p120f;
    const u32 high = pack_bf16(scaled, 0.0f);
    return pack_bf16(scaled, scaled - __uint_as_float(high << 16));
}

// Two bf16 of the codes kFirst and kFirst + 1 of four, times their scale, rounded once but for the last 2^-17: the bits
// of a code, moved to where bf16 has exponent and fraction, are 2^-120 of its value. (The code of NaN counts as 480.)
template <u32 kFirst> __device__ __forceinline__ u32 decode_pair(u32 codes, u32 high, u32 low) {
    const u32 apart = __byte_perm(codes, 0, kFirst == 0 ? 0x1404 : 0x3424);
    const u32 value = (apart & 0x80008000) | (apart >> 4 & 0x07f007f0);
    u32 small, sum;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(small) : "r"(value), "r"(low));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(value), "r"(high), "r"(small));
    return sum;
}
__device__ __forceinline__ uint4 decode_eight(u32 first, u32 second, u32 high, u32 low) {
    return {decode_pair<0>(first, high, low), decode_pair<2>(first, high, low), decode_pair<0>(second, high, low),
            decode_pair<2>(second, high, low)};
}

__device__ __forceinline__ void st_shared(u32 smem, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Where in the cache 16 tokens are, one a lane, and a bit for each that there is; 0 is the place of the others.
struct TokenRows {
    u32 row, there;

    __device__ __forceinline__ u32 operator[](u32 token) const { return __shfl_sync(0xffffffff, row, token); }
    __device__ __forceinline__ bool has(u32 token) const { return there >> token & 1; }
};

// The lines of 16 tokens on their way into L2. (Bulk prefetches are slower: 5 microseconds a block of keys became 5.5.)
__device__ __forceinline__ void prefetch_tokens(const u8* cache, const TokenRows& rows) {
    constexpr u32 kLines = 6;
#pragma unroll
    for (u32 i = opaque(lane_index()); i < 16 * kLines; i += 32) {
        const u32 row = rows[i / kLines];
        if (rows.has(i / kLines)) prefetch_l2(cache + u64(row) * kTokenBytes + i % kLines * 128);
    }
}

// Four tokens on their way from memory, in the registers of a warp: 16 columns of each a lane, and of token lane / 4 % 4
// the scale of the columns from 128 (lane % 4) on. What takes the place of a token that there is not is read too, and
// counts as zero: a branch around a load would have ptxas copy, and so wait for, the result at once.
struct TokenBatch {
    static constexpr u32 kTokens = 4;
    uint4 codes[kTokens];
    float scale;
    u32 there;

    __device__ __forceinline__ void load(const u8* cache, const TokenRows& rows, u32 first) {
        const u32 lane = opaque(lane_index());
        there = rows.there >> first;
        scale = ld_stream_float(cache + u64(rows[first + lane / 4 % kTokens]) * kTokenBytes + kScalesAt + lane % 4 * 4);
#pragma unroll
        for (u32 j = 0; j < kTokens; ++j)
            codes[j] = ld_stream(cache + u64(rows[first + j]) * kTokenBytes + lane * 16);
    }

    // Into rows `to_row` .. of the tiles at `tiles`, to_row % 4 == 0.
    __device__ __forceinline__ void decode(u32 tiles, u32 to_row) const {
        const u32 lane = opaque(lane_index());
        const u32 factors = there >> lane / 4 % kTokens & 1 ? split_scale(scale) : 0;
        // Neighbouring quads begin with different halves of their 32 bytes, or their stores would meet in a bank.
        const bool is_odd = lane / 4 % 2;
        const u32 to = tiles + lane / 4 * kTokenChunkBytes + to_row * 128;
        const u32 unit = (lane % 4 * 32 + is_odd * 16) ^ to_row % 8 * 16;
#pragma unroll
        for (u32 j = 0; j < kTokens; ++j) {
            const uint4 c = codes[j];
            const u32 factor = __shfl_sync(0xffffffff, factors, j * 4 + lane / 8);
            const u32 high = __byte_perm(factor, 0, 0x1010), low = __byte_perm(factor, 0, 0x3232);
            const u32 at = to + j * 128 + (unit ^ j * 16);
            st_shared(at, decode_eight(is_odd ? c.z : c.x, is_odd ? c.w : c.y, high, low));
            st_shared(at ^ 16, decode_eight(is_odd ? c.x : c.z, is_odd ? c.y : c.w, high, low));
        }
    }
};

// The last 64 columns of 16 tokens, as they are, into rows `to_row` .. of the tile.
__device__ __forceinline__ void copy_tails(u32 tile, u32 to_row, const u8* cache, const TokenRows& rows) {
    const u32 lane = opaque(lane_index()), unit = lane % 8;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 j = i * 4 + lane / 8, to = to_row + j;
        cp_async_16(tile + to * 128 + (unit ^ to % 8) * 16, cache + u64(rows[j]) * kTokenBytes + kTailAt + unit * 16,
                    rows.has(j) * 16);
    }
}

}  // namespace jitgen
