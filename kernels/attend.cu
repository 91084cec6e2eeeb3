// Causal attention over the paged cache: the twin of ops/attention.
//
// Positions are cut into partitions of 512 at absolute places, a partition into 16 blocks of 32. In a
// block: scores (a product of the canon over the head dimension), scaled, capped, masked; the new
// maximum; weights, which are exponentials rounded to the cache's type; sum and values
//   sum = sum * f + (sixteen lanes, one tree),   out = out * f + (even chain + odd chain over positions)
// with f = exp(old maximum - new). Partitions are appended in ascending order:
//   max = larger,  sum = sum * f + part.sum * g,  out = out * f + part.out * g
//
// A thread block takes Q queries of one key/value head (rows times heads of the group), so grouped
// heads share every load. With `split`, grid.z is the partition and results go to `parts`, which
// attend_merge appends; else the thread block walks all partitions and finishes. Scores and value
// sums of the blocks are independent, so the warps take a block each; what must be in order is one
// operation a block.
//
// grid (tiles of queries, kv_heads, partitions or 1), block 256 (128 where Q is 8), dynamic shared
// memory 4 * Q * (512 + padded head_dim + warps * head_dim) bytes: at most 45 KiB, with Q at most 4
// for heads wider than 128. Per position and key/value head 4 * head_dim bytes and Q * 2 * head_dim
// FMA. At 8B (32 layers, 8 heads of 128) a context of 8192 is 1 GiB a token, 0.32 ms at 3.35 TB/s;
// four queries make 2 FMA a byte, so memory is the roof for decode. At batch 1 and short contexts it is
// latency: 1024 positions are 16 thread blocks of 256 KiB each, and 8 warps with 2 KiB on the way
// need about 10 us for that. Never timed on a card.
#include "attention.cuh"

#define MERGE_THREADS 128

#ifdef CONTROL_NO_BARRIER
#define SUMS_ARE_WRITTEN()
#else
#define SUMS_ARE_WRITTEN() __syncthreads()
#endif

extern __shared__ float4 attend_memory[];

// The larger of two running values as the CPU's lanes find it, over 32 scores: lane 0 has it.
__device__ __forceinline__ float block_maximum(float score) {
    float value = larger(score, __shfl_down_sync(FULL, score, LANES));
#pragma unroll
    for (int half = LANES / 2; half > 0; half /= 2)
        value = larger(value, __shfl_down_sync(FULL, value, half));
    return value;
}

template <bool F16, int Q>
struct Attend {
    // Shared memory: weights (512, Q), queries (Q, padded), sums of values (warps, Q, head_dim).
    float *weights, *inputs, *sums;
    const Queries<Q>& queries;
    const u16 *keys, *values;  // of this key/value head in block 0
    const u32* blocks;
    int head_dim, padded, block_keys, block_values, warp, lane;

    // Scores of one block by one warp, a position a lane; its maxima for each query.
    __device__ __forceinline__ void scores(const Shape& shape, int block, float (*maxima)[BLOCKS]) {
        const uint4* words = (const uint4*)(keys + (u64)blocks[block] * block_keys);
        float* own = weights + (block % BLOCKS * TILE + lane) * Q;
        float score[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) score[q] = 0.0f;
#pragma unroll(Q == 1 ? 2 : 1)  // two tiles of more queries would spill
        for (int t = 0; t < padded / TILE; ++t) {
            uint4 word[4];
#pragma unroll
            for (int plane = 0; plane < 4; ++plane)
                word[plane] = words[t * TILE_WORDS + tile_word(plane, lane)];
#pragma unroll
            for (int q = 0; q < Q; ++q) {
                const float4* input = (const float4*)(inputs + q * padded + t * TILE);
                score[q] = __fadd_rn(score[q], block_product<F16>(word, input));
            }
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) own[q] = score[q];
        const int position = block * TILE + lane;
#pragma unroll 1
        for (int q = 0; q < Q; ++q) {
            float x = __fmul_rn(own[q], shape.scale);
            if (shape.cap != 0.0f) x = canon_softcap(x, shape.cap);
            if (position > queries.position[q] || position < queries.start[q]) x = NEG_INFINITY;
            const float maximum = block_maximum(x);
            if (lane == 0) maxima[q][block % BLOCKS] = maximum;
            own[q] = x;
        }
    }

    __device__ __forceinline__ bool sees(int q, int block) const {
        return block * TILE <= queries.position[q] && (block + 1) * TILE > queries.start[q];
    }

    // Scores of one block into weights, and their sums.
    __device__ __forceinline__ void soften(
        int block, const float (*maxima)[BLOCKS], float (*block_sums)[BLOCKS]) {
        float* own = weights + (block % BLOCKS * TILE + lane) * Q;
#pragma unroll 1
        for (int q = 0; q < Q; ++q) {
            float weight = 0.0f;
            if (sees(q, block)) {
                const float exact = canon_exp(__fadd_rn(own[q], -maxima[q][block % BLOCKS]));
                weight = even_of<F16>(round_to(exact, F16));
            }
            own[q] = weight;
            const float sum = lane_sum(__fadd_rn(weight, __shfl_down_sync(FULL, weight, LANES)));
            if (lane == 0) block_sums[q][block % BLOCKS] = sum;
        }
    }

    // Weighted values of one block by one warp, two dimensions a lane at a time.
    __device__ __forceinline__ void weigh(int block, int end) {
        const u32* from = (const u32*)(values + (u64)blocks[block] * block_values);
        const int pairs = head_dim / 2, count = min(TILE, end - block * TILE);
        const float* own = weights + block % BLOCKS * TILE * Q;
#pragma unroll 1
        for (int p = lane; p < pairs; p += WARP) {
            float even[Q][2], odd[Q][2];
#pragma unroll
            for (int q = 0; q < Q; ++q) even[q][0] = even[q][1] = odd[q][0] = odd[q][1] = 0.0f;
#pragma unroll 4
            for (int j = 0; j < TILE; j += 2) {
                // What lies behind the last position is another sequence's, and may be no number.
                const u32 a = j < count ? from[j * pairs + p] : 0;
                const u32 b = j + 1 < count ? from[(j + 1) * pairs + p] : 0;
#pragma unroll
                for (int q = 0; q < Q; ++q) {
                    const float w = own[j * Q + q], v = own[(j + 1) * Q + q];
                    even[q][0] = __fmaf_rn(even_of<F16>(a), w, even[q][0]);
                    even[q][1] = __fmaf_rn(odd_of<F16>(a), w, even[q][1]);
                    odd[q][0] = __fmaf_rn(even_of<F16>(b), v, odd[q][0]);
                    odd[q][1] = __fmaf_rn(odd_of<F16>(b), v, odd[q][1]);
                }
            }
#pragma unroll
            for (int q = 0; q < Q; ++q) {
                float* to = sums + (warp * Q + q) * head_dim + 2 * p;
                to[0] = __fadd_rn(even[q][0], odd[q][0]);
                to[1] = __fadd_rn(even[q][1], odd[q][1]);
            }
        }
    }
};

template <bool F16, int Q, int WARPS>
__device__ __forceinline__ void attend(
    const u16* inputs, const u16* keys, const u16* values, const u32* tables, const Tile* tiles,
    float* parts, u16* out, const Shape& shape, int partitions_max, int split) {
    // A thread owns some elements of the result: (query, column), with 128 columns or 256.
    constexpr int THREADS = WARPS * WARP;
    constexpr int ITEMS = Q == 8 ? 8 : (Q * 256 + THREADS - 1) / THREADS;
    __shared__ float maxima[Q][BLOCKS], block_sums[Q][BLOCKS], factors[Q][BLOCKS];
    __shared__ float part_max[Q], part_sum[Q], total_max[Q], total_sum[Q], own_factor[Q], part_factor[Q];
    __shared__ Queries<Q> queries;
    const int tid = threadIdx.x, head_dim = shape.head_dim;
    const int padded = (head_dim + TILE - 1) / TILE * TILE, wide = head_dim > 128 ? 8 : 7;
    const Tile tile = tiles[blockIdx.x];
    if (tid < Q) {
        queries.find(tid, tile, shape, blockIdx.y);
        total_max[tid] = NEG_INFINITY;
        total_sum[tid] = 0.0f;
    }
    __syncthreads();
    const int end = queries.position[Q - 1] + 1, start = queries.start[0];
    const int first_partition = split ? blockIdx.z : start / PARTITION;
    const int last_partition = split ? blockIdx.z : (end - 1) / PARTITION;
    if (split && (first_partition < start / PARTITION || last_partition > (end - 1) / PARTITION)) return;
    float* memory = (float*)attend_memory;
    Attend<F16, Q> a = {
        memory, memory + PARTITION * Q, memory + (PARTITION + padded) * Q, queries,
        keys + blockIdx.y * padded * TILE, values + blockIdx.y * TILE * head_dim, tables + tile.table,
        head_dim, padded, shape.kv_heads * padded * TILE, shape.kv_heads * TILE * head_dim,
        tid / WARP, tid % WARP};
    for (int q = 0; q < Q; ++q)
        for (int d = tid; d < padded; d += THREADS)
            a.inputs[q * padded + d] = d < head_dim ? even_of<F16>(inputs[queries.at[q] * head_dim + d]) : 0.0f;
    float total[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) total[i] = 0.0f;
#pragma unroll 1
    for (int partition = first_partition; partition <= last_partition; ++partition) {
        const int first_block = max(partition * BLOCKS, start / TILE);
        const int end_block = min((partition + 1) * BLOCKS, (end + TILE - 1) / TILE);
        __syncthreads();
#pragma unroll 1
        for (int block = first_block + a.warp; block < end_block; block += WARPS)
            a.scores(shape, block, maxima);
        SUMS_ARE_WRITTEN();
        if (tid < Q) {
            float max = NEG_INFINITY;
#pragma unroll 1
            for (int block = first_block; block < end_block; ++block) {
                const float old = max;
                max = larger(old, maxima[tid][block % BLOCKS]);
                factors[tid][block % BLOCKS] = canon_exp(a.sees(tid, block) ? __fadd_rn(old, -max) : 0.0f);
                maxima[tid][block % BLOCKS] = max;
            }
            part_max[tid] = max;
        }
        SUMS_ARE_WRITTEN();
#pragma unroll 1
        for (int block = first_block + a.warp; block < end_block; block += WARPS)
            a.soften(block, maxima, block_sums);
        SUMS_ARE_WRITTEN();
        if (tid < Q) {
            float sum = 0.0f;
#pragma unroll 1
            for (int block = first_block; block < end_block; ++block)
                if (a.sees(tid, block))
                    sum = __fmaf_rn(sum, factors[tid][block % BLOCKS], block_sums[tid][block % BLOCKS]);
            part_sum[tid] = sum;
        }
        float part[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) part[i] = 0.0f;
#pragma unroll 1
        for (int round = first_block; round < end_block; round += WARPS) {
            if (round + a.warp < end_block) a.weigh(round + a.warp, end);
            SUMS_ARE_WRITTEN();
            const int count = min(WARPS, end_block - round);
#pragma unroll 1
            for (int b = 0; b < count; ++b)
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) {
                    const int item = tid + i * THREADS, q = item >> wide, d = item & ((1 << wide) - 1);
                    if (q < Q && d < head_dim)
                        part[i] = __fmaf_rn(part[i], factors[q][(round + b) % BLOCKS],
                                            a.sums[(b * Q + q) * head_dim + d]);
                }
            SUMS_ARE_WRITTEN();
        }
        if (split) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                const int item = tid + i * THREADS, q = item >> wide, d = item & ((1 << wide) - 1);
                if (d >= head_dim || q >= tile.queries) continue;
                float* to = parts + (queries.at[q] * partitions_max + partition) * (head_dim + 2);
                to[2 + d] = part[i];
                if (d == 0) {
                    to[0] = part_max[q];
                    to[1] = part_sum[q];
                }
            }
            return;
        }
        if (tid < Q)
            join_partition(part_max[tid], part_sum[tid], total_max[tid], total_sum[tid], own_factor[tid],
                           part_factor[tid]);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int q = (tid + i * THREADS) >> wide;
            if (q < Q && own_factor[q] != NOTHING_SEEN)
                total[i] = __fmaf_rn(total[i], own_factor[q], __fmul_rn(part[i], part_factor[q]));
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int item = tid + i * THREADS, q = item >> wide, d = item & ((1 << wide) - 1);
        if (d < head_dim && q < tile.queries)
            out[queries.at[q] * head_dim + d] = round_to(__fdiv_rn(total[i], total_sum[q]), F16);
    }
}

#define ATTEND(name, is_f16, count, warps, resident)                                                        \
    extern "C" __global__ void __launch_bounds__(warps * WARP, resident) name(                            \
        const u16* queries, const u16* keys, const u16* values, const u32* tables, const Tile* tiles, \
        float* parts, u16* out, Shape shape, int partitions_max, int split) {                        \
        attend<is_f16, count, warps>(queries, keys, values, tables, tiles, parts, out, shape,               \
                              partitions_max, split);                                                \
    }
ATTEND(attend_bf16_1, false, 1, 8, 3)
ATTEND(attend_bf16_4, false, 4, 8, 2)
ATTEND(attend_bf16_8, false, 8, 4, 3)
ATTEND(attend_f16_1, true, 1, 8, 3)
ATTEND(attend_f16_4, true, 4, 8, 2)
ATTEND(attend_f16_8, true, 8, 4, 3)

// Appends the partitions of each row and head. grid (rows, heads), block 128; positions (rows).
// Per row, head and partition 4 * (head_dim + 2) bytes.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS) attend_merge(
    const float* parts, const u32* positions, u16* out, Shape shape, int partitions_max, int is_f16) {
    const int position = positions[blockIdx.x], head_dim = shape.head_dim;
    const u64 query = (u64)blockIdx.x * shape.heads + blockIdx.y;
    const int first = first_seen(position, shape.window) / PARTITION, last = position / PARTITION;
    for (int d = threadIdx.x; d < head_dim; d += MERGE_THREADS) {
        float max = NEG_INFINITY, sum = 0.0f, total = 0.0f;
        for (int i = 0; i <= last - first; ++i) {
#ifdef CONTROL_MERGES_DESCENDING
            const float* part = parts + (query * partitions_max + last - i) * (head_dim + 2);
#else
            const float* part = parts + (query * partitions_max + first + i) * (head_dim + 2);
#endif
            if (part[1] == 0.0f) continue;
            const float joint = larger(max, part[0]);
            const float f = joint_factor(max, joint), g = joint_factor(part[0], joint);
            max = joint;
            sum = __fmaf_rn(sum, f, __fmul_rn(part[1], g));
            total = __fmaf_rn(total, f, __fmul_rn(part[2 + d], g));
        }
        out[query * head_dim + d] = round_to(__fdiv_rn(total, sum), is_f16);
    }
}
