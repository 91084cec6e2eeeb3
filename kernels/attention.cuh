// What both kinds of attention share: where positions are cut, what a thread block is told of its
// queries, and how partitions are joined.
#pragma once
#include "canon.cuh"

#define BLOCKS 16                   // of a partition
#define PARTITION (BLOCKS * TILE)   // positions
#define NOTHING_SEEN -1.0f          // in place of a factor

// One tile of queries of a sequence: query i is row first_row + i / group, head i % group of the
// group. Row r is at position `start` + r - `row_zero`.
struct Tile {
    int row_zero, start, first_query, queries;
    int table;  // where the sequence's block table begins
    int unused;
};

struct Shape {
    int heads, kv_heads, head_dim;
    int window;  // positions that a query sees, 0 for all
    float scale, cap;  // a cap of 0 is none
};

__device__ __forceinline__ int first_seen(int position, int window) {
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

// The factor that brings what is relative to `own` to a larger maximum.
__device__ __forceinline__ float joint_factor(float own, float max) {
    return canon_exp(__fadd_rn(own, -max));
}

// What a thread block knows of its queries.
template <int Q>
struct Queries {
    u64 at[Q];       // row * heads + head
    int position[Q];
    int start[Q];    // first position that it sees

    // Query `i` of a tile. Queries past the last one repeat it, and are not written.
    __device__ __forceinline__ void find(int i, const Tile& tile, const Shape& shape, int kv_head) {
        const int group = shape.heads / shape.kv_heads;
        const int query = tile.first_query + min(i, tile.queries - 1);
        const int row = query / group, head = kv_head * group + query % group;
        at[i] = (u64)(tile.row_zero + row) * shape.heads + head;
        position[i] = tile.start + row;
        start[i] = first_seen(tile.start + row, shape.window);
    }
};

// A query's running maximum and sum after a partition, and the factors of both sides.
__device__ __forceinline__ void join_partition(
    float part_max, float part_sum, float& max, float& sum, float& own_factor, float& part_factor) {
    // Where something was seen, the largest score has weight one; a NaN is not zero.
    const bool is_empty = part_sum == 0.0f;
    const float joint = is_empty ? max : larger(max, part_max);
    own_factor = is_empty ? NOTHING_SEEN : joint_factor(max, joint);
    part_factor = joint_factor(part_max, joint);
    if (!is_empty) sum = __fmaf_rn(sum, own_factor, __fmul_rn(part_sum, part_factor));
    max = joint;
}
