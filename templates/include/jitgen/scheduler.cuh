// The persistent tile traversal: the device side of jitgen.ir.Traversal.
#pragma once
#include "jitgen/types.cuh"

namespace jitgen {

// A tile of D: its origin; its group, where that one's rows begin and end, and how many tile rows they make.
struct Tile {
    u32 m, n, group, begin_m, end_m, num_rows;
};

// Cluster tiles in groups of kGroup tile rows, column by column within a group, so that a group's B tiles stay in L2.
template <u32 kGroup, u32 kColumns> struct Traversal {
    u32 rows, m;

    __device__ __forceinline__ u32 size() const { return rows * kColumns; }

    // The `index`-th cluster tile; its origin in units of it.
    __device__ __forceinline__ Tile tile(u32 index) const {
        constexpr u64 kGroupTiles = u64(kGroup) * kColumns;
        u32 first = 0;  // a group of more tiles than an index can count is the only one
        if constexpr (kGroupTiles <= 0xffffffff) first = index / u32(kGroupTiles) * kGroup;
        const u32 group_rows = min(kGroup, rows - first);
        const u32 within = index - first * kColumns;
        return {first + within % group_rows, within / group_rows, 0, 0, m, rows};
    }
};

}  // namespace jitgen
