// Tokens of an FP8 cache: 512 E4M3 codes, a float32 scale for each 128 of them, then 64 BF16 elements. What a warp of the
// producer does to have 16 tokens of a block of keys in shared memory as BF16, in tiles as TMA would leave them.
#pragma once
#include "jitgen/attention.cuh"
#include "jitgen/mbarrier.cuh"
#include "jitgen/tma.cuh"

namespace jitgen {

constexpr u32 kTokenBytes = 656, kScalesAt = 512, kTailAt = 528;
constexpr u32 kTokenChunkBytes = 64 * 128;  // of a tile: 64 tokens, 64 columns
constexpr u32 kCodeChunks = 512 / 64;       // tiles of decoded codes; the last columns have one more

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

// `bytes` of memory to shared memory, both at multiples of 16; the barrier counts them.
__device__ __forceinline__ void bulk_load(u32 smem, const u8* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Where block `rank` of the cluster has what this one has at `smem`; the distance is the same everywhere.
__device__ __forceinline__ u32 map_shared(u32 smem, u32 rank) {
    u32 mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(smem), "r"(rank));
    return mapped;
}

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
    u32 apart, small, sum;  // a code in each half, its sign in all bits above it
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(apart) : "r"(codes), "n"(kFirst == 0 ? 0x9180 : 0xb3a2));
    const u32 value = apart << 4 & 0x87f087f0;
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
__device__ __forceinline__ uint2 ld_shared_u2(u32 smem) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(smem) : "memory");
    return v;
}

// To a place of another block of the cluster, whose barrier counts the bytes.
__device__ __forceinline__ void st_async(u32 mapped, u32 mapped_barrier, uint4 v) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(mapped), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(mapped_barrier)
                 : "memory");
}
// The same of `kBytes` of shared memory, which must stay as they are until they are there.
template <u32 kBytes> __device__ __forceinline__ void bulk_send(u32 mapped, u32 from, u32 mapped_barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(mapped), "r"(from), "n"(kBytes), "r"(mapped_barrier)
                 : "memory");
}

// Where in the cache 16 tokens are, one a lane, and a bit for each that there is; 0 is the place of the others.
struct TokenRows {
    u32 row, there;

    __device__ __forceinline__ u32 operator[](u32 token) const { return __shfl_sync(0xffffffff, row, token); }
    __device__ __forceinline__ bool has(u32 token) const { return there >> token & 1; }
};

// The lines of `kCount` tokens from `first` on their way into L2. (Bulk prefetches are slower: 5 microseconds a block
// of keys became 5.5.)
template <u32 kCount>
__device__ __forceinline__ void prefetch_tokens(const u8* cache, const TokenRows& rows, u32 first) {
    constexpr u32 kLines = 6;
#pragma unroll
    for (u32 i = opaque(lane_index()); i < round_up(kCount * kLines, 32); i += 32) {
        const u32 token = first + i / kLines, row = rows[token % 16];
        if (i < kCount * kLines && rows.has(token)) prefetch_l2(cache + u64(row) * kTokenBytes + i % kLines * 128);
    }
}

// Where decoded tokens go: the tiles of a block of keys, here and, `to_peer` from here, in the other block of a
// cluster, and the barrier that says that they are there.
struct TokenTiles {
    u32 keys, full, to_peer;
};

// Four tokens in the registers of a warp: 16 columns of each a lane; of token lane / 4 % 4 the scale of the columns
// from 128 (lane % 4) on; of token lane / 8 eight of the last columns. A token that there is not counts as zero.
struct TokenBatch {
    static constexpr u32 kTokens = 4, kBytes = kTokens * kTokenBytes;
    uint4 codes[kTokens], tail;
    float scale;

    // Which of its two units of 8 columns a lane has first: neighbouring quads' stores would meet in a bank, and, the
    // other way round every 16 lanes, so would what they read of them.
    static __device__ __forceinline__ u32 first_unit(u32 lane) { return (lane / 4 ^ lane / 8) % 2; }

    // From memory, in flight. What takes the place of a token that there is not is read too: a branch around a load
    // would have ptxas copy, and so wait for, the result at once.
    __device__ __forceinline__ void load(const u8* cache, const TokenRows& rows, u32 first) {
        const u32 lane = opaque(lane_index());
        scale = ld_stream_float(cache + u64(rows[first + lane / 4 % kTokens]) * kTokenBytes + kScalesAt + lane % 4 * 4);
#pragma unroll
        for (u32 j = 0; j < kTokens; ++j)
            codes[j] = ld_stream(cache + u64(rows[first + j]) * kTokenBytes + lane * 16);
        tail = ld_stream(cache + u64(rows[first + lane / 8]) * kTokenBytes + kTailAt + lane % 8 * 16);
    }
    // From shared memory, where they lie as in the cache.
    __device__ __forceinline__ void read(u32 smem) {
        const u32 lane = opaque(lane_index()), at = smem + lane * 16 + first_unit(lane) * 8;
        scale = ld_shared(smem + lane / 4 % kTokens * kTokenBytes + kScalesAt + lane % 4 * 4);
#pragma unroll
        for (u32 j = 0; j < kTokens; ++j) {
            const uint2 first = ld_shared_u2(at + j * kTokenBytes), second = ld_shared_u2((at ^ 8) + j * kTokenBytes);
            codes[j] = {first.x, first.y, second.x, second.y};
        }
        tail = ld_shared_u4(smem + lane / 8 * kTokenBytes + kTailAt + lane % 8 * 16);
    }

    // Those of which a bit in `there` is set, into rows `to_row` .. of the tiles, to_row % 4 == 0. With kShared the
    // last columns go to the peer at once: this block's math warpgroups write over its own, perhaps before a copy of
    // them would be done.
    template <bool kInOrder, bool kShared>
    __device__ __forceinline__ void decode(const TokenTiles& tiles, u32 to_row, u32 there) const {
        const u32 lane = opaque(lane_index());
        const u32 factors = there >> lane / 4 % kTokens & 1 ? split_scale(scale) : 0;
        const u32 to = tiles.keys + lane / 4 * kTokenChunkBytes + to_row * 128;
        const u32 unit = (lane % 4 * 2 + first_unit(lane) ^ to_row % 8) * 16;
        const bool is_swapped = kInOrder && first_unit(lane);
#pragma unroll
        for (u32 j = 0; j < kTokens; ++j) {
            const uint4 c = codes[j];
            const u32 factor = __shfl_sync(0xffffffff, factors, j * 4 + lane / 8);
            const u32 high = __byte_perm(factor, 0, 0x1010), low = __byte_perm(factor, 0, 0x3232);
            const u32 at = to + j * 128 + (unit ^ j * 16);
            st_shared(at, decode_eight(is_swapped ? c.z : c.x, is_swapped ? c.w : c.y, high, low));
            st_shared(at ^ 16, decode_eight(is_swapped ? c.x : c.z, is_swapped ? c.y : c.w, high, low));
        }
        const u32 row = to_row + lane / 8;
        const u32 last = tiles.keys + kCodeChunks * kTokenChunkBytes + row * 128 + (lane % 8 ^ row % 8) * 16;
        const uint4 v = there >> lane / 8 & 1 ? tail : uint4{0, 0, 0, 0};
        st_shared(last, v);
        if constexpr (kShared) st_async(last + tiles.to_peer, tiles.full + tiles.to_peer, v);
    }
};

// The tokens from `first` on, of a warp's 16 of a block of keys, that it decodes, four at a time: batches 0, 1 ..
// kBatches. Here they wait in registers, two batches on their way.
template <u32 kBatches, bool kShared> struct TokensInRegisters {
    const u8* cache;
    u32 first;
    TokenBatch batches[2];

    __device__ __forceinline__ void fetch(u32 i, const TokenRows& rows) {
        batches[i % 2].load(cache, rows, first + i * TokenBatch::kTokens);
    }
    __device__ __forceinline__ void start(const TokenRows& rows) { fetch(0, rows), fetch(1, rows); }
    __device__ __forceinline__ void begin(u32) {}
    __device__ __forceinline__ void decode(u32 i, u32, const TokenTiles& tiles, u32 to_row, u32 there) const {
        const u32 from = first + i * TokenBatch::kTokens;
        batches[i % 2].template decode<true, kShared>(tiles, to_row + from, there >> from);
    }
    // Once batch i of `rows` has been decoded.
    __device__ __forceinline__ void refill(u32 i, const TokenRows& rows, const TokenRows& next, bool) {
        fetch((i + 2) % kBatches, i + 2 < kBatches ? rows : next);
    }
};

// The same, copied to shared memory as they are, with a bulk copy for each kRun neighbours; the batch after the one
// that is decoded is read meanwhile. `turn`: how many blocks of keys there were before.
template <u32 kBatches, bool kShared, u32 kRun> struct TokensInSharedMemory {
    const u8* cache;
    u32 first, smem, barriers;
    TokenBatch batches[2];

    __device__ __forceinline__ void fetch(u32 i, const TokenRows& rows) {
        const u32 from = first + i * TokenBatch::kTokens, barrier = barriers + 8 * i;
        const u32 there = rows.there >> from & (1 << TokenBatch::kTokens) - 1, bytes = __popc(there) * kTokenBytes;
        const bool is_leader = elect_one();
        if (is_leader) mbarrier_arrive_expect_tx(barrier, bytes);
#pragma unroll
        for (u32 j = 0; j < TokenBatch::kTokens; j += kRun) {
            const u32 row = rows[from + j];
            if (is_leader && there >> j & 1)
                bulk_load(smem + i * TokenBatch::kBytes + j * kTokenBytes, cache + u64(row) * kTokenBytes,
                          kRun == 1 ? kTokenBytes : bytes, barrier);
        }
        __syncwarp();
    }
    __device__ __forceinline__ void read(u32 i, u32 turn) {
        mbarrier_wait(opaque(barriers) + 8 * i, turn & 1);
        batches[i % 2].read(opaque(smem) + i * TokenBatch::kBytes);
    }
    __device__ __forceinline__ void start(const TokenRows& rows) {
#pragma unroll
        for (u32 i = 0; i < kBatches; ++i) fetch(i, rows);
    }
    __device__ __forceinline__ void begin(u32 turn) { read(0, turn); }
    __device__ __forceinline__ void decode(u32 i, u32 turn, const TokenTiles& tiles, u32 to_row, u32 there) {
        if (i + 1 < kBatches) read(i + 1, turn);
        const u32 from = first + i * TokenBatch::kTokens;
        batches[i % 2].template decode<false, kShared>(tiles, to_row + from, there >> from);
    }
    __device__ __forceinline__ void refill(u32 i, const TokenRows&, const TokenRows& next, bool has_next) {
        __syncwarp();  // all have read it
        if (has_next) fetch(i, next);
    }
};

// Eight rows, from `to_row` on, of what was decoded from codes, to the peer.
__device__ __forceinline__ void send_rows(const TokenTiles& tiles, u32 to_row) {
    fence_proxy_async();
    __syncwarp();
    if (!elect_one()) return;
#pragma unroll
    for (u32 chunk = 0; chunk < kCodeChunks; ++chunk) {
        const u32 at = tiles.keys + chunk * kTokenChunkBytes + to_row * 128;
        bulk_send<8 * 128>(at + tiles.to_peer, at, tiles.full + tiles.to_peer);
    }
}

}  // namespace jitgen
