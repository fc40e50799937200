// The split-KV plan, made by a warp of every thread block, each for itself, from the lengths of the sequences
// (jitgen/ir_mla.py, Split): a part owns the blocks of keys in a range of costs, and so at most two sequences that it
// shares with other parts: its first and its last. With kWhole it owns the sequences whose cost begins in the range, and
// shares none.
#pragma once
#include "jitgen/attention.cuh"

namespace jitgen {

// Blocks [begin, end) of a sequence of `length` keys, of which `num_parts` parts from `first_part` on have some.
struct Segment {
    u32 sequence, length, begin, end, first_part, num_parts;
};

// What the producer tells the math warpgroups, in shared memory: the segment at hand, one past the end being the last
// one's successor, and, before that, those that the part shares with others; and whether each part has one at most.
struct Announcement {
    Segment segment, shared[2];
    u32 num_shared, is_apart;
};
constexpr u32 kNoSequence = 0xffffffff;

// How many keys a sequence has, by what memory has of it.
struct SequenceLengths {
    const int* seqlens;
    __device__ __forceinline__ int look_up(u32 sequence) const { return int(ld_global(seqlens + sequence)); }
    __device__ __forceinline__ u32 num_keys(int found) const { return u32(max(found, 0)); }
};
// How many of its `topk` keys one of the kTokens query tokens of a sequence is to look at: all, or as many as there is
// a number for the sequence.
template <u32 kTokens> struct TopkLengths {
    const int* lengths;
    u32 topk;
    __device__ __forceinline__ int look_up(u32 token) const {
        return lengths ? int(ld_global(lengths + token / kTokens)) : int(topk);
    }
    __device__ __forceinline__ u32 num_keys(int found) const { return min(u32(max(found, 0)), topk); }
};

template <class Lengths, u32 kBlockKeys, u32 kOverhead, u32 kSlack, bool kWhole> struct SegmentWalker {
    // What memory has of the lengths of four times 32 sequences, one of each 32 a lane.
    static constexpr u32 kLines = 4;
    struct Lines { int of[kLines]; };

    Lengths lengths;
    u32 num_sequences, span;  // cost of a part
    u32 lead, unit;           // of a sequence's cost: what is beside its blocks, and what they are rounded up to
    u32 begin, end;           // of this part
    u32 sequence, position;   // the next sequence, and where its cost begins

    // What memory has of the lane's sequence among the 32 from `first` on; beyond the last sequence of that one: with a
    // branch around a load ptxas would wait for it there.
    __device__ __forceinline__ int look_up_32(u32 first) const {
        return lengths.look_up(min(first + lane_index(), num_sequences - 1));
    }
    // From sequence `first` on, all at once.
    __device__ __forceinline__ Lines look_up(u32 first) const {
        Lines lines;
#pragma unroll
        for (u32 i = 0; i < kLines; ++i) lines.of[i] = look_up_32(first + i * 32);
        return lines;
    }
    // Of the lane's sequence among the 32 from `first` on; 0 beyond the last.
    __device__ __forceinline__ u32 num_blocks(u32 first, int found) const {
        return first + lane_index() < num_sequences ? max(ceil_div(lengths.num_keys(found), kBlockKeys), 1) : 0;
    }
    __device__ __forceinline__ u32 num_blocks(u32 first) const { return num_blocks(first, look_up_32(first)); }
    __device__ __forceinline__ u32 cost(u32 num_blocks) const {
        return num_blocks == 0 ? 0 : lead + round_up(num_blocks, unit);
    }
    // Calls visit(first sequence, the lane's blocks) for 32 sequences at a time, until it returns false or all were
    // visited; true if all were.
    template <class Visit> __device__ __forceinline__ bool visit_all(u32 blocks, Visit visit) const {
#pragma unroll 1
        for (u32 first = 0; visit(first, blocks); blocks = num_blocks(first)) {
            if ((first += 32) >= num_sequences) return true;
        }
        return false;
    }
    // The sum over this lane and those before it.
    static __device__ __forceinline__ u32 scan(u32 sum) {
#pragma unroll
        for (u32 step = 1; step < 32; step *= 2) {
            const u32 other = __shfl_up_sync(0xffffffff, sum, step);
            if (lane_index() >= step) sum += other;
        }
        return sum;
    }

    // Whether the sequences fit into parts of that span: each into parts of its own or, if there are more sequences
    // than parts, side by side with none cut at a part's bounds but one that begins there.
    __device__ __forceinline__ bool fits(u32 first_blocks, u32 num_parts, u32 span) const {
        u32 before = 0;
        if (num_sequences <= num_parts) {
            visit_all(first_blocks, [&](u32, u32 blocks) {
                before += __reduce_add_sync(0xffffffff, ceil_div(blocks, span));
                return true;
            });
            return before <= num_parts;
        }
        return visit_all(first_blocks, [&](u32, u32 blocks) {
            const u32 to = before + scan(blocks), from = (to - blocks) % span;
            before = __shfl_sync(0xffffffff, to, 31);
            return !__any_sync(0xffffffff, from > 0 && from + blocks > span);
        });
    }

    // By a whole warp, for the part of that index; `lines` is look_up(0). Later on L1 has all.
    __device__ __forceinline__ void start(u32 part, u32 num_parts, Lines lines) {
        const u32 first_blocks = num_blocks(0, lines.of[0]);
        u32 own = 0;
#pragma unroll 1
        for (u32 first = 0;; lines = look_up(first)) {
#pragma unroll
            for (u32 i = 0; i < kLines; ++i) own += num_blocks(first + i * 32, lines.of[i]);
            if ((first += kLines * 32) >= num_sequences) break;
        }
        const u32 total = __reduce_add_sync(0xffffffff, own);
        span = ceil_div(total, num_parts), lead = 0, unit = 1;
        if (num_sequences > 1) {
            // The least of kSlack spans with which they fit.
            u32 k = 0;
#pragma unroll 1
            while (k < kSlack && !fits(first_blocks, num_parts, span + k)) ++k;
            if (k < kSlack) span += k, unit = num_sequences <= num_parts ? span : 1;
            else span = ceil_div(total + num_sequences * kOverhead, num_parts), lead = kOverhead;
        }
        begin = part * span, end = begin + span, sequence = num_sequences, position = 0;
        u32 before = 0;
        visit_all(first_blocks, [&](u32 first, u32 blocks) {
            const u32 own = cost(blocks), all = __reduce_add_sync(0xffffffff, own);
            if (begin >= before + all) return before += all, true;
            const u32 to = before + scan(own), from = to - own;
            const u32 owner = __ballot_sync(0xffffffff, begin >= from && begin < to);
            sequence = first + __ffs(owner) - 1;
            position = __shfl_sync(0xffffffff, from, sequence - first);
            return false;
        });
    }

    // Whether each sequence has parts of its own.
    __device__ __forceinline__ bool is_apart() const { return unit == span || num_sequences == 1; }

    // The part's next segment; one without keys is the part's in whose range its cost begins.
    __device__ __forceinline__ bool next(Segment& segment) {
        while (sequence < num_sequences && position < end) {
            const u32 length = lengths.num_keys(lengths.look_up(sequence)), blocks = ceil_div(length, kBlockKeys);
            const u32 first = position + lead, last = first + blocks;
            const bool has_start = position >= begin;
            if constexpr (kWhole) {
                segment = {sequence, length, 0, blocks, 0, 1};
                position += cost(max(blocks, 1)), ++sequence;
                if (has_start) return true;
                continue;
            }
            const u32 from = max(begin, first) - first, to = min(max(end, first), last) - first;
            segment = {sequence, length, from, to, first / span, 1};
            if (blocks > 0) segment.num_parts = (last - 1) / span - segment.first_part + 1;
            position += cost(max(blocks, 1)), ++sequence;
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
