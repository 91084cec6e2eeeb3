// Causal attention over the paged cache on tensor cores, in an order of its own: attention of the mode
// `tensor`, whose canon has the name mma-sm<XY>-2.
//
// Positions are cut into partitions of 512 at absolute places, a partition into 16 blocks of 32. For a
// query:
//   score of a position: s = 0, then for each 32 elements of the head, ascending: s = mma(key, query, s)
//     over its elements with k % 8 < 4, then over those with k % 8 >= 4; scaled, capped, masked
//   weight = exp(score - the largest score of the partition), rounded to the cache's type
//   sum = ((0 + b_0) + b_1) + ..., b_i over the weights of block i: positions g, g + 8, g + 16 and g + 24
//     as (a + b) + (c + d), then a tree over the eight g at distances 4, 2, 1
//   out = 0, then for each block, ascending: out = mma(value, weight, out) over its positions with
//     j % 8 < 4, then over those with j % 8 >= 4
// Partitions are appended in ascending order as in attend.cu.
//
// Nothing of that depends on which queries share a tile, so a row has the same bits in prefill and in
// decode: kernels for few and for many queries differ in the number of columns alone. A block that a
// query does not see adds products with weights of zero, which change no sum as long as values are
// finite.
//
// Keys are read as matmul_tensor.cu reads weights: a warp takes a block of 32 positions, and its words
// go straight to registers as fragments. Values lie as the same kind of tile, transposed (a row is a
// dimension, a column a position: qkv_finish with `packs_values`), so that a warp takes 16 dimensions
// of all blocks. Scores stay in registers until the partition's maximum is known; the weights then
// lie in shared memory as 16-bit values, which all warps read.
//
// grid (tiles of 8 or 32 queries, kv_heads, partitions or 1), block 512, dynamic shared memory
// 16 * Q * (4 * (head tiles | 1) + 68) bytes: 44 KiB for 32 queries of 128 elements. Bytes: keys and
// values once a tile, 4 * head_dim a position and key/value head; products 2 * head_dim a query and
// position. 32 queries make 16 products a byte, which L2 of an H100 (about 5.5 TB/s) feeds to 88 T
// products/s, 29 % of what mma.sync is said to reach: the roof of prefill is L2. Decode with 8 queries
// or fewer is bound by memory. Never timed on a card.
#include "attention.cuh"
#include "mma.cuh"

// Blocks of a partition. Another value is another canon: tests build it, for all kernels and for few
// queries alone, to see that they would notice.
#ifndef MMA_BLOCKS
#define MMA_BLOCKS BLOCKS
#endif
#ifndef MMA_BLOCKS_DECODE
#define MMA_BLOCKS_DECODE MMA_BLOCKS
#endif

#define WARPS BLOCKS                       // a block of positions each
#define WEIGHT_WORDS (PARTITION / 8 + 4)   // of a query; the last four keep rows off each other's banks

#ifdef CONTROL_NO_BARRIER
#define ALL_ARE_HERE()
#else
#define ALL_ARE_HERE() __syncthreads()
#endif

extern __shared__ uint4 attend_mma_memory[];

// What a thread block of 8 N queries shares.
template <int N>
struct Shared {
    Queries<8 * N> queries;
    float maxima[WARPS][8 * N], block_sums[WARPS][8 * N];
    float part_max[8 * N], part_sum[8 * N], total_max[8 * N], total_sum[8 * N];
    float own_factor[8 * N], part_factor[8 * N];
};

// The largest, or the sum, over the eight lanes that have the same columns.
__device__ __forceinline__ float column_maximum(float value) {
#pragma unroll
    for (int distance = 4; distance < WARP; distance *= 2)
        value = fmaxf(value, __shfl_xor_sync(FULL, value, distance));
    return value;
}
__device__ __forceinline__ float column_sum(float value) {
#pragma unroll
    for (int distance = 16; distance >= 4; distance /= 2)
        value = __fadd_rn(value, __shfl_xor_sync(FULL, value, distance));
    return value;
}

// The first `count` of the eight values of a word, and zeros: what lies behind the last position is
// another sequence's, and may be no number.
__device__ __forceinline__ uint4 only_first(uint4 word, int count) {
    u32 words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = count >= 2 * i + 2 ? words[i] : count == 2 * i + 1 ? words[i] & 0xffffu : 0;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool F16, int N>
struct AttendMma {
    Shared<N>& shared;
    const Shape& shape;
    uint4* inputs;  // shared: (queries, input_words)
    u16* weights;   // shared: (queries, WEIGHT_WORDS * 8)
    const uint4 *keys, *values;  // of this key/value head in block 0
    const u32* blocks;
    int tiles, input_words, block_words, warp, g, t;

    // Scores of a block: rows are positions, columns queries.
    __device__ __forceinline__ void multiply(int block, Sums<N>& scores) const {
        const uint4* from = keys + (u64)blocks[block] * block_words + tile_word(t, g);
#pragma unroll(N == 1 ? 2 : 1)  // more would spill
        for (int k = 0; k < tiles; ++k) {
            uint4 word[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) word[r] = from[k * TILE_WORDS + tile_word(0, 8 * r)];
#pragma unroll
            for (int n = 0; n < N; ++n)
                scores.template add_block<F16>(n, word, inputs[(8 * n + g) * input_words + 4 * k + t]);
        }
    }

    // Scales, caps and masks the scores of a block; the largest of each query to `maxima`.
    __device__ __forceinline__ void finish(int block, bool is_there, Sums<N>& scores) {
        float* all = &scores.of[0][0][0];
#pragma unroll
        for (int i = 0; i < 8 * N; ++i) all[i] = __fmul_rn(all[i], shape.scale);
        if (shape.cap != 0.0f) {
            // They turn in a circle: so the code of a cap is there once.
#pragma unroll 1
            for (int turn = 0; turn < 8 * N; ++turn) {
                const float capped = canon_softcap(all[0], shape.cap);
#pragma unroll
                for (int i = 1; i < 8 * N; ++i) all[i - 1] = all[i];
                all[8 * N - 1] = capped;
            }
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int q = 8 * n + 2 * t + odd;
                const int last = shared.queries.position[q], first = shared.queries.start[q];
                float max = NEG_INFINITY;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& score = scores.of[i / 2][n][i % 2 * 2 + odd];
                    const int position = block * TILE + 8 * i + g;
                    if (!is_there || position > last || position < first) score = NEG_INFINITY;
                    max = fmaxf(max, score);
                }
                max = column_maximum(max);
                if (g == 0) shared.maxima[warp][q] = max;
            }
    }

    // Scores of a block to weights, and their sums.
    __device__ __forceinline__ void soften(const Sums<N>& scores) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                const int q = 8 * n + 2 * t + odd;
                const float max = shared.part_max[q];
                float weight[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float score = scores.of[i / 2][n][i % 2 * 2 + odd];
                    const float exact = score == NEG_INFINITY ? 0.0f : canon_exp(__fadd_rn(score, -max));
                    const u16 bits = round_to(exact, F16);
                    weights[q * WEIGHT_WORDS * 8 + warp * TILE + 8 * i + g] = bits;
                    weight[i] = even_of<F16>(bits);
                }
                const float sum = column_sum(
                    __fadd_rn(__fadd_rn(weight[0], weight[1]), __fadd_rn(weight[2], weight[3])));
                if (g == 0) shared.block_sums[warp][q] = sum;
            }
    }

    // Weighted values of 16 dimensions over blocks; columns `first` to `last` of eight queries each.
    __device__ __forceinline__ void weigh(
        int group, int first, int last, int partition_block, int first_block, int end_block, int end,
        float (&part)[N][4]) const {
        const uint4* row = values + group / 2 * TILE_WORDS + tile_word(t, group % 2 * 16 + g);
        const uint4* weight = (const uint4*)weights + g * WEIGHT_WORDS + t;
#pragma unroll(N == 1 ? 4 : 1)
        for (int block = first_block; block < end_block; ++block) {
            const uint4* from = row + (u64)blocks[block] * block_words;
            uint4 low = from[0], high = from[8];
            const int count = end - block * TILE - 8 * t;
            if (count < 8) {
                low = only_first(low, count);
                high = only_first(high, count);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if (n < first || n >= last) continue;
                const uint4 w = weight[8 * n * WEIGHT_WORDS + (block - partition_block) * 4];
                mma<F16>(part[n], low.x, high.x, low.y, high.y, w.x, w.y);
                mma<F16>(part[n], low.z, high.z, low.w, high.w, w.z, w.w);
            }
        }
    }
};

template <bool F16, int N, int PART_BLOCKS>
__device__ __forceinline__ void attend_mma(
    const u16* inputs, const uint4* keys, const uint4* values, const u32* tables, const Tile* tiles,
    float* parts, u16* out, const Shape& shape, int partitions_max, int split) {
    constexpr int Q = 8 * N;
    __shared__ Shared<N> shared;
    const int tid = threadIdx.x, lane = tid % WARP, head_dim = shape.head_dim;
    const int head_tiles = (head_dim + TILE - 1) / TILE, input_words = 4 * (head_tiles | 1);
    const Tile tile = tiles[blockIdx.x];
    if (tid < Q) {
        shared.queries.find(tid, tile, shape, blockIdx.y);
        shared.total_max[tid] = NEG_INFINITY;
        shared.total_sum[tid] = 0.0f;
    }
    __syncthreads();
    const int end = shared.queries.position[Q - 1] + 1, start = shared.queries.start[0];
    constexpr int POSITIONS = PART_BLOCKS * TILE;
    const int first_partition = split ? blockIdx.z : start / POSITIONS;
    const int last_partition = split ? blockIdx.z : (end - 1) / POSITIONS;
    if (split && (first_partition < start / POSITIONS || last_partition > (end - 1) / POSITIONS)) return;
    AttendMma<F16, N> a = {
        shared, shape, attend_mma_memory, (u16*)(attend_mma_memory + Q * input_words),
        keys + blockIdx.y * head_tiles * TILE_WORDS, values + blockIdx.y * head_tiles * TILE_WORDS,
        tables + tile.table, head_tiles, input_words, shape.kv_heads * head_tiles * TILE_WORDS,
        tid / WARP, lane / 4, lane % 4};
    for (int i = tid; i < Q * 4 * head_tiles; i += WARPS * WARP) {
        const int q = i / (4 * head_tiles), word = i % (4 * head_tiles);
        a.inputs[q * input_words + word] =
            load_eight(inputs + shared.queries.at[q] * head_dim, 8 * word, head_dim);
    }
    // 16 dimensions are one warp's, or those of two or four warps with a part of the queries each.
    const int groups = (head_dim + 15) / 16;
    const int sharers = N == 1 || groups > WARPS / 2 ? 1 : groups > WARPS / 4 ? 2 : 4;
    const int group = a.warp / sharers, columns = N / sharers;
    const int first_column = a.warp % sharers * columns, last_column = first_column + columns;
    float total[N][4] = {};
#pragma unroll 1
    for (int partition = first_partition; partition <= last_partition; ++partition) {
        const int partition_block = partition * PART_BLOCKS;
        const int first_block = max(partition_block, start / TILE);
        const int end_block = min(partition_block + PART_BLOCKS, (end + TILE - 1) / TILE);
        const int block = partition_block + a.warp;
        const bool is_there = block >= first_block && block < end_block;
        ALL_ARE_HERE();
        Sums<N> scores;
        scores.clear();
        if (is_there) a.multiply(block, scores);
        a.finish(block, is_there, scores);
        ALL_ARE_HERE();
        if (tid < Q) {
            float max = NEG_INFINITY;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) max = fmaxf(max, shared.maxima[warp][tid]);
            shared.part_max[tid] = max;
        }
        ALL_ARE_HERE();
        a.soften(scores);
        ALL_ARE_HERE();
        if (tid < Q) {
            float sum = 0.0f;
#pragma unroll 1
            for (int warp = 0; warp < PART_BLOCKS; ++warp)
                sum = __fadd_rn(sum, shared.block_sums[warp][tid]);
            shared.part_sum[tid] = sum;
            if (!split)
                join_partition(shared.part_max[tid], sum, shared.total_max[tid], shared.total_sum[tid],
                               shared.own_factor[tid], shared.part_factor[tid]);
        }
        float part[N][4] = {};
        if (group < groups)
            a.weigh(group, first_column, last_column, partition_block, first_block, end_block, end, part);
        ALL_ARE_HERE();
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
            const int n = i / 4, q = 8 * n + 2 * a.t + i % 2, d = 16 * group + i % 4 / 2 * 8 + a.g;
            if (!split) {
                if (shared.own_factor[q] != NOTHING_SEEN)
                    total[n][i % 4] = __fmaf_rn(total[n][i % 4], shared.own_factor[q],
                                                __fmul_rn(part[n][i % 4], shared.part_factor[q]));
                continue;
            }
            if (n < first_column || n >= last_column || d >= head_dim || q >= tile.queries) continue;
            float* to = parts + (shared.queries.at[q] * partitions_max + partition) * (head_dim + 2);
            to[2 + d] = part[n][i % 4];
            if (d == 0) {
                to[0] = shared.part_max[q];
                to[1] = shared.part_sum[q];
            }
        }
        if (split) return;
    }
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) {
        const int n = i / 4, q = 8 * n + 2 * a.t + i % 2, d = 16 * group + i % 4 / 2 * 8 + a.g;
        if (n < first_column || n >= last_column || d >= head_dim || q >= tile.queries) continue;
        out[shared.queries.at[q] * head_dim + d] =
            round_to(__fdiv_rn(total[n][i % 4], shared.total_sum[q]), F16);
    }
}

#define ATTEND(name, is_f16, groups, part_blocks, resident)                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP, resident) name(                         \
        const u16* queries, const uint4* keys, const uint4* values, const u32* tables,                 \
        const Tile* tiles, float* parts, u16* out, Shape shape, int partitions_max, int split) {       \
        attend_mma<is_f16, groups, part_blocks>(queries, keys, values, tables, tiles, parts, out,      \
                                                shape, partitions_max, split);                         \
    }
ATTEND(attend_mma_bf16_8, false, 1, MMA_BLOCKS_DECODE, 1)
ATTEND(attend_mma_bf16_32, false, 4, MMA_BLOCKS, 1)
ATTEND(attend_mma_f16_8, true, 1, MMA_BLOCKS_DECODE, 1)
ATTEND(attend_mma_f16_32, true, 4, MMA_BLOCKS, 1)
