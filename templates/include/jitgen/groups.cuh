// Groups of rows, each multiplied by a B of its own: which rows are whose, found on the device, and the walk over their
// tiles. The device side of jitgen.groups and of jitgen.ir.ForTiles.
#pragma once
#include "jitgen/mbarrier.cuh"
#include "jitgen/scheduler.cuh"

namespace jitgen {

// What the tensor `groups` holds, in the order of jitgen.problem.Layout.
constexpr u32 kRagged = 0, kGroupEnds = 1, kGroupOfRow = 2, kMasked = 3, kKGrouped = 4;

// The sum, and the maximum, of the values of the lanes before this one; 0 without any.
__device__ __forceinline__ u32 sum_before(u32 value, u32 lane) {
    u32 sum = value;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(0xffffffff, sum, step);
        if (lane >= step) sum += other;
    }
    return sum - value;
}
__device__ __forceinline__ u32 max_before(u32 value, u32 lane) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(0xffffffff, value, step);
        if (lane >= step) value = max(value, other);
    }
    const u32 before = __shfl_up_sync(0xffffffff, value, 1);
    return lane == 0 ? 0 : before;
}

// Asks L2 for the first kBytes of kRows rows of B, those of `tile` from its row `first` on; it has kHalfRows in each of
// kHalves. By kThreads threads, 32 bytes at a time: the unit that loads tiles would take as long as for a load.
template <u32 kRows, u32 kHalves, u32 kHalfRows, u32 kN, u32 kK, u32 kBytes, u32 kThreads>
__device__ __forceinline__ void prefetch_rows(const fp8_e4m3* b, u64 stride, const Tile& tile, u32 first) {
    constexpr u32 kSectors = ceil_div(kBytes < kK ? kBytes : kK, 32);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < kRows * kSectors; i += kThreads) {
        const u32 row = first + i / kSectors, column = tile.n + row % kHalfRows;
        const u64 row_of_b = u64(tile.group * kHalves + row / kHalfRows) * kN + column;
        if (column < kN) asm volatile("prefetch.global.L2 [%0];" ::"l"(b + row_of_b * stride + i % kSectors * 32));
    }
}

// Tiles of a block that are remembered: those that math warpgroups (at most 3, in turns) compute or store, those whose
// scales are loaded (at most 4 chunks), and the next one.
constexpr u32 kTileSlots = 8;

// In shared memory. Rows count through all matrices of A; `runs` is of kGroupOfRow. Of kKGrouped, `begin` and `end` are
// units of kAlignment of k, and every group that has some has all m rows.
template <u32 kNumGroups> struct GroupTable {
    uint4 tiles[kTileSlots];  // of this block, by round: m, n, group, end_m
    u32 begin[kNumGroups], end[kNumGroups], runs[kNumGroups];
    u32 first_tile[kNumGroups + 1];  // tile rows of the groups before, and of all
    u32 num_whole, num_tiles;        // tiles that are not cut; those and the parts of others

    // Who loads a tile's scales finds it; who computes it takes it from here, when the first of them have come.
    __device__ __forceinline__ void put_tile(u32 round, const Tile& tile) {
        tiles[round % kTileSlots] = {tile.m, tile.n, tile.group, tile.end_m};
    }
    __device__ __forceinline__ Tile get_tile(u32 round) const {
        const uint4 v = tiles[round % kTileSlots];
        return {v.x, v.y, v.z, 0, v.w, 0};
    }

    // For kGroupOfRow, by all threads: from each group's first row to its last, and how many runs of rows it has there.
    template <u32 kNumThreads> __device__ __forceinline__ void scan(const int* groups, u32 m) {
        for (u32 i = threadIdx.x; i < kNumGroups; i += kNumThreads) begin[i] = 0xffffffff, end[i] = 0, runs[i] = 0;
        named_barrier_sync<kNumThreads>(0);
        // Four rows at once, which are 16 bytes: counted from such a boundary, rows begin at `skew`. Little code,
        // because it runs once, and all of it comes from memory.
        constexpr u32 kBatch = 8;  // of a thread, whose loads are under way at once
        const u32 skew = reinterpret_cast<u64>(groups) / sizeof(int) % 4;
        groups -= skew;
        const auto load = [&](u32 at) { return at - skew < m ? __ldg(groups + at) : -1; };
#pragma unroll 1
        for (u32 first = 4 * threadIdx.x; first <= m + skew; first += 4 * kBatch * kNumThreads) {
            int4 four[kBatch];
            int before[kBatch];
#pragma unroll
            for (u32 i = 0; i < kBatch; ++i) {
                const u32 at = first + 4 * i * kNumThreads;
                const bool is_inside = at > skew && at + 4 <= m + skew;
                four[i] = is_inside ? __ldg(reinterpret_cast<const int4*>(groups + at)) : int4{};
                before[i] = is_inside ? __ldg(groups + at - 1) : -1;
            }
            u32 differing = 0;  // which of them hold more than one group, or lie at an end
#pragma unroll
            for (u32 i = 0; i < kBatch; ++i) {
                const int4 v = four[i];
                const bool differs = v.x != before[i] || v.y != v.x || v.z != v.y || v.w != v.z;
                if (differs && first + 4 * i * kNumThreads <= m + skew) differing |= 1u << i;
            }
#pragma unroll 1
            for (; differing != 0; differing &= differing - 1) {
                const u32 at = first + 4 * (__ffs(differing) - 1) * kNumThreads;
                int last = load(at - 1);
#pragma unroll 1
                for (u32 i = at; i < at + 4; ++i) {
                    const int group = load(i);
                    if (group != last && u32(group) < kNumGroups) {
                        atomicMin(&begin[group], i - skew);
                        atomicAdd(&runs[group], 1);
                    }
                    if (group != last && u32(last) < kNumGroups) atomicMax(&end[last], i - skew);
                    last = group;
                }
            }
        }
        named_barrier_sync<kNumThreads>(0);
    }

    // By one warp, of which each lane owns some groups: where their rows lie, and how many tiles of kTileRows rows they
    // make in kColumns columns. `step` tiles are a round: those of the last are cut in kCuts if all parts find a place.
    template <u32 kLayout, u32 kAlignment, u32 kTileRows, u32 kColumns, u32 kCuts>
    __device__ __forceinline__ void find(const int* groups, u32 m, u32 k, u32 step) {
        constexpr u32 kOwned = ceil_div(kNumGroups, 32);
        const u32 lane = lane_index(), first = lane * kOwned;
        constexpr bool kByK = kLayout == kKGrouped;
        const auto position = [&](u32 i) {
            return u32(min(max(__ldg(groups + i), 0), int(kByK ? k : m))) / (kByK ? kAlignment : 1);
        };
        u32 value[kOwned], largest = 0, num_rows = 0;
        if constexpr (kLayout != kGroupOfRow) {
#pragma unroll
            for (u32 i = 0; i < kOwned; ++i) {
                value[i] = first + i < kNumGroups ? position(first + i + (kLayout == kRagged || kByK)) : 0;
                largest = max(largest, value[i]);
            }
        }
        u32 previous = 0;  // where the group before ends, for positions that must not decrease
        if constexpr (kLayout == kRagged || kLayout == kGroupEnds || kByK) previous = max_before(largest, lane);
        if constexpr (kLayout == kRagged || kByK) previous = max(previous, position(0));
#pragma unroll
        for (u32 i = 0; i < kOwned; ++i) {
            const u32 group = first + i;
            if (group >= kNumGroups) break;
            if constexpr (kLayout == kMasked) {
                begin[group] = group * m, end[group] = group * m + value[i];
            } else if constexpr (kLayout != kGroupOfRow) {
                begin[group] = kByK ? previous : min(round_up(previous, kAlignment), m);
                previous = max(previous, value[i]);
                end[group] = max(begin[group], previous);
            } else if (runs[group] == 0) {
                begin[group] = 0;
            }
            first_tile[group] = num_rows;
            const u32 height = !kByK ? end[group] - begin[group] : begin[group] < end[group] ? m : 0;
            num_rows += ceil_div(height, kTileRows);
        }
        const u32 before = sum_before(num_rows, lane);
#pragma unroll
        for (u32 i = 0; i < kOwned; ++i)
            if (first + i < kNumGroups) first_tile[first + i] += before;
        if (lane == 31) {
            first_tile[kNumGroups] = before + num_rows;
            const u32 all = (before + num_rows) * kColumns, last = kCuts > 1 ? all % step : 0;
            const bool is_cut = kCuts > 1 && last * kCuts <= step;
            num_whole = is_cut ? all - last : all;
            num_tiles = is_cut ? all - last + last * kCuts : all;
        }
    }

    // The group that has the `row`-th tile row.
    __device__ __forceinline__ u32 of_tile_row(u32 row) const {
        u32 group = 0;
#pragma unroll
        for (u32 step = 256; step > 0; step /= 2)
            if (step < kNumGroups && group + step < kNumGroups && first_tile[group + step] <= row) group += step;
        return group;
    }
};

// The traversal of one group after the other, so that the tiles of one B are walked together. Of tiles that are cut,
// each part of kCutRows rows is one; origins are in units of these.
template <u32 kRasterGroup, u32 kColumns, u32 kNumGroups, u32 kCuts, u32 kCutRows> struct GroupedTraversal {
    const GroupTable<kNumGroups>& table;

    __device__ __forceinline__ u32 size() const { return table.num_tiles; }

    __device__ __forceinline__ Tile tile(u32 index) const {
        const bool is_cut = kCuts > 1 && index >= table.num_whole;
        const u32 beyond = is_cut ? index - table.num_whole : 0;
        index -= beyond - beyond / kCuts;
        const u32 group = table.of_tile_row(index / kColumns), first = table.first_tile[group];
        const Traversal<kRasterGroup, kColumns> of_group{table.first_tile[group + 1] - first, table.end[group]};
        Tile tile = of_group.tile(index - first * kColumns);
        tile.group = group, tile.begin_m = table.begin[group];
        tile.m = tile.m * kCuts + beyond % kCuts;
        if (is_cut) tile.end_m = min(tile.end_m, tile.begin_m + (tile.m + 1) * kCutRows);
        return tile;
    }
};

// The same where every group has a part of k, and all m rows of a D of its own.
template <u32 kRasterGroup, u32 kColumns, u32 kNumGroups> struct KGroupedTraversal {
    const GroupTable<kNumGroups>& table;
    u32 m;

    __device__ __forceinline__ u32 size() const { return table.first_tile[kNumGroups] * kColumns; }

    __device__ __forceinline__ Tile tile(u32 index) const {
        const u32 group = table.of_tile_row(index / kColumns), first = table.first_tile[group];
        const Traversal<kRasterGroup, kColumns> of_group{table.first_tile[group + 1] - first, m};
        Tile tile = of_group.tile(index - first * kColumns);
        tile.group = group;
        return tile;
    }

    // Of the `index`-th tile.
    __device__ __forceinline__ u32 num_k_blocks(u32 index) const {
        const u32 group = table.of_tile_row(index / kColumns);
        return table.end[group] - table.begin[group];
    }
};

// The tiles of one of `step` blocks (or clusters), one a round, from round `first_round` on. From round to round it
// moves up by a place: tiles of few rows come at regular distances, and would meet the same blocks in every round.
// Those would run ahead, and what is shared of B would be read from memory more than once.
struct TileWalk {
    u32 round, place, step;

    __device__ __forceinline__ TileWalk(u32 first, u32 step, u32 first_round = 0) : round(0), place(first), step(step) {
        advance(first_round);
    }

    __device__ __forceinline__ u32 index() const { return round * step + place; }
    __device__ __forceinline__ u32 next() const { return index() + (place + 1 == step ? 1 : step + 1); }

    __device__ __forceinline__ void advance(u32 rounds) {
        for (u32 i = 0; i < rounds; ++i) {
            ++round;
            place = place + 1 == step ? 0 : place + 1;
        }
    }
};

// Gives back, unread, what was loaded for a tile of which no row is the math warpgroup's: to kNumPeers blocks of the
// cluster, of which `peer_rank` tells the rank, or without any to its own.
template <u32 kNumKBlocks, u32 kScaleBlocks, u32 kNumPeers, class Math, class PeerRank>
__device__ __forceinline__ void skip_tile(Math& math, const PeerRank& peer_rank) {
#pragma unroll 1
    for (u32 k_block = 0; k_block < kNumKBlocks; ++k_block, math.pipeline.advance()) {
        if (k_block % kScaleBlocks == 0) {
            const u32 full = math.full_scales + 8 * math.scale_pipeline.stage;
            mbarrier_wait(full, math.scale_pipeline.phase);
            if (math.lane == 0) mbarrier_arrive(full + 8 * math.scale_pipeline.kNumStages);
            math.scale_pipeline.advance();
        }
        const u32 full = math.full_barriers + 8 * math.pipeline.stage, empty = full + 8 * math.pipeline.kNumStages;
        mbarrier_wait(full, math.pipeline.phase);
        if (math.lane < kNumPeers) mbarrier_arrive_remote(empty, peer_rank(math.lane));
        if (kNumPeers == 0 && math.lane == 0) mbarrier_arrive(empty);
    }
}

}  // namespace jitgen
