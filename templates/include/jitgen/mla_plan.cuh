// The split-KV plan, made by every thread block for itself from the lengths of the sequences: a sequence costs its
// blocks of keys and kOverhead; the sum is cut into parts of equal cost, in the order of the sequences. A part owns the
// blocks in its range, and so at most two sequences that it shares with other parts: its first and its last. With kWhole
// it has all blocks of the sequences whose cost begins in its range, and shares none.
#pragma once
#include "jitgen/attention.cuh"

namespace jitgen {

// Blocks [begin, end) of a sequence of `length` keys, of which `num_parts` parts from `first_part` on have some.
struct Segment {
    u32 sequence, length, begin, end, first_part, num_parts;
};

// What the producer tells the math warpgroups, in shared memory: the segment at hand, one past the end being the last
// one's successor, and, before that, those that the part shares with others.
struct Announcement {
    Segment segment, shared[2];
    u32 num_shared;
};
constexpr u32 kNoSequence = 0xffffffff;

// How many keys a sequence has.
struct SequenceLengths {
    const int* seqlens;
    __device__ __forceinline__ u32 operator()(u32 sequence) const {
        return u32(max(int(ld_global(seqlens + sequence)), 0));
    }
};
// How many of its `topk` keys one of the kTokens query tokens of a sequence is to look at: all, or as many as there is
// a number for the sequence.
template <u32 kTokens> struct TopkLengths {
    const int* lengths;
    u32 topk;
    __device__ __forceinline__ u32 operator()(u32 token) const {
        return lengths ? min(u32(max(int(ld_global(lengths + token / kTokens)), 0)), topk) : topk;
    }
};

template <class Lengths, u32 kBlockKeys, u32 kOverhead, bool kWhole> struct SegmentWalker {
    Lengths num_keys;
    u32 num_sequences, span;  // cost of a part
    u32 begin, end;           // of this part
    u32 sequence, position;   // the next sequence, and where its cost begins

    __device__ __forceinline__ u32 cost(u32 sequence) const {
        return ceil_div(num_keys(sequence), kBlockKeys) + kOverhead;
    }

    // To be called once by all kThreads threads of the block, which lends kThreads / 32 + 2 words of shared memory.
    template <u32 kThreads>
    __device__ __forceinline__ void start(Lengths lengths, u32 count, u32 part, u32 num_parts, u32* scratch) {
        constexpr u32 kWarps = kThreads / 32;
        const u32 per_thread = ceil_div(count, kThreads), first = threadIdx.x * per_thread;
        const u32 last = min(first + per_thread, count), lane = threadIdx.x % 32;
        num_keys = lengths, num_sequences = count;
        u32 own = 0;
        for (u32 i = first; i < last; ++i) own += cost(i);
        u32 sum = own;  // of this lane's and those before it
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            const u32 other = __shfl_up_sync(0xffffffff, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane == 31) scratch[threadIdx.x / 32] = sum;
        if (threadIdx.x == 0) scratch[kWarps] = count, scratch[kWarps + 1] = 0;
        __syncthreads();
        u32 total = 0, before = 0;
#pragma unroll
        for (u32 warp = 0; warp < kWarps; ++warp) {
            if (warp == threadIdx.x / 32) before = total;
            total += scratch[warp];
        }
        span = ceil_div(total, num_parts);
        begin = part * span, end = min(begin + span, total);
        u32 at = before + sum - own;
        if (begin >= at && begin < at + own) {
            u32 i = first;
            for (u32 c; at + (c = cost(i)) <= begin; ++i) at += c;
            scratch[kWarps] = i, scratch[kWarps + 1] = at;
        }
        __syncthreads();
        sequence = scratch[kWarps], position = scratch[kWarps + 1];
    }

    // The part's next segment; one without keys is the part's in whose range its cost begins.
    __device__ __forceinline__ bool next(Segment& segment) {
        while (sequence < num_sequences && position < end) {
            const u32 length = num_keys(sequence), blocks = ceil_div(length, kBlockKeys);
            const u32 first = position + kOverhead, last = first + blocks;
            const bool has_start = position >= begin;
            if constexpr (kWhole) {
                segment = {sequence, length, 0, blocks, 0, 1};
                ++sequence, position = last;
                if (has_start) return true;
                continue;
            }
            const u32 from = max(begin, first) - first, to = min(max(end, first), last) - first;
            segment = {sequence, length, from, to, first / span, 1};
            if (blocks > 0) segment.num_parts = (last - 1) / span - segment.first_part + 1;
            ++sequence, position = last;
            if (segment.begin < segment.end || (blocks == 0 && has_start)) return true;
        }
        return false;
    }
};

// The page numbers of one sequence, 64 at a time in the lanes of a warp; slots beyond the sequence's end stay unread.
struct PageTable {
    const int* row;
    u32 num_pages, window, pages[2];

    __device__ __forceinline__ u32 fetch(u32 from) const {
        const u32 slot = from * 32 + lane_index();
        return slot < num_pages ? ld_global(row + slot) : 0;
    }
    // From here on no page before `page` is asked for, and none more than 32 beyond.
    __device__ __forceinline__ void seek(u32 page, bool first) {
        if (first) {
            window = page / 32;
            pages[0] = fetch(window), pages[1] = fetch(window + 1);
        } else if (page / 32 > window) {
            pages[0] = pages[1], pages[1] = fetch(++window + 1);
        }
    }
    __device__ __forceinline__ u32 operator[](u32 page) const {
        return __shfl_sync(0xffffffff, page / 32 == window ? pages[0] : pages[1], page % 32);
    }
};

}  // namespace jitgen
