// Matrix products on tensor cores (mma.sync.m16n8k16, bf16 or f16 in, f32 out), in an order of their
// own: the mode `tensor`. Its canon is mma-sm<XY>-2, XY being the card's architecture, because the
// additions within one mma are the hardware's.
//
//   out[t][r] = ((0 + s_0) + s_1) + ...,   s_i over slices of 512 elements of k, ascending
//   s_i = 0, then for each block of 32 elements of k, ascending: s = mma(w, x, s) over its elements
//         with k % 8 < 4, then over those with k % 8 >= 4
//
// Decode gives slices to warps and adds their sums through shared memory; prefill makes them one after
// the other. Tiles of rows and tokens touch no output's order, so a row has the same bits in every
// batch and chunk, in prefill and in decode. A column of zeros fills up where tokens are missing, and
// zeros fill up k.
//
// Weights are packed as for matmul_portable.cu; both modes multiply by the same copy. A fragment of an
// mma wants of a thread four elements of k of two rows. Which ones is free as long as weights and
// inputs agree, so thread (g, t) takes elements 8 t to 8 t + 7 of a block, which lie together: one
// 16-byte load holds a row's half of the fragments of two mma, straight to registers, and the inputs
// are 16-byte loads as well. A warp reads a tile (32 rows by 32 k) with four loads, each four times 128
// contiguous bytes.
//
// Decode (8 or 32 tokens a thread block, 32 rows): 2 KiB of weights a tile and warp, two or three tiles
// ahead in registers, 4 mma for 8 tokens. The roof is memory: 16 GB at 3.35 TB/s are 4.8 ms. Eight
// warps hold 32 to 48 KiB under way.
//
// Prefill (128 tokens by 64 rows a thread block, 32 rows by 64 tokens a warp): three tiles of k in
// shared memory by cp.async, 12 KiB each. For a tile a warp reads 6 KiB of shared memory, 48 cycles of an
// SM at 128 bytes a cycle, for 32 mma of 2048 products: 64 cycles on an A100, about 52 on an H100. The
// roof is arithmetic. With 184 to 194 registers a thread an SM holds two thread blocks.
//
// Never timed on a card.
#include "mma.cuh"

// Elements of k whose products are summed together before they join an output. Another value is
// another canon: tests build it, for all kernels and for decode alone, to see that they would notice.
#ifndef MMA_SLICE
#define MMA_SLICE 512
#endif
#ifndef MMA_SLICE_DECODE
#define MMA_SLICE_DECODE MMA_SLICE
#endif

#define DECODE_WARPS 8
#define PREFILL_WARPS 4
#define PREFILL_ROWS 64
#define PREFILL_TOKENS 128
#define STAGES 3
#define PAD 2   // 16-byte words behind a plane in shared memory, so that four planes meet no bank twice
#define STRIDE (TILE + 4)  // floats of a token's sums in shared memory, for the same reason

#ifdef CONTROL_NO_BARRIER
#define ALL_ARE_HERE()
#else
#define ALL_ARE_HERE() __syncthreads()
#endif

// A copy of 16 bytes to shared memory, or of zeros, that nobody waits for yet.
__device__ __forceinline__ void copy_async(uint4* to, const void* from, bool is_there) {
#if defined(CUDA_HOST_SHIM)
    shim_copy_async(to, from, is_there ? 16 : 0);
#else
    const u32 shared = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(is_there ? 16 : 0)
                 : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(CUDA_HOST_SHIM)
    shim_commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies but those of the last group.
__device__ __forceinline__ void wait_for_copies_but_one() {
#if defined(CUDA_HOST_SHIM)
    shim_wait_for_copies(1);
#else
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

// 32 rows (tile `row_tile`) by 8 N tokens from `first` on.
template <bool F16, int N, int AHEAD, class Map>
__device__ __forceinline__ void decode_mma(
    const uint4* w, const u16* x, float* out, int rows, int cols, int tokens, int row_tile, int first,
    Map map) {
    constexpr int SLICE_TILES = MMA_SLICE_DECODE / TILE;
    __shared__ float sums[DECODE_WARPS][8 * N][STRIDE];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int tiles = (cols + TILE - 1) / TILE, slices = (tiles + SLICE_TILES - 1) / SLICE_TILES;
    const uint4* row_tiles = w + (u64)row_tile * tiles * TILE_WORDS + tile_word(t, g);
    float totals[N] = {};  // of row `lane`, tokens warp + 8 n
    for (int round = 0; round < slices; round += DECODE_WARPS) {
        const int begin = (round + warp) * SLICE_TILES, end = min(begin + SLICE_TILES, tiles);
        uint4 weights[AHEAD][4], inputs[AHEAD][N];
        auto load = [&](int i, int k) {
            if (k >= end) return;
#pragma unroll
            for (int r = 0; r < 4; ++r)
                weights[i][r] = __ldg(row_tiles + (u64)k * TILE_WORDS + tile_word(0, 8 * r));
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int token = first + 8 * n + g;
                inputs[i][n] = token < tokens ? load_eight(x + map.input(token) * cols, k * TILE + 8 * t, cols)
                                              : make_uint4(0, 0, 0, 0);
            }
        };
        Sums<N> sum;
        sum.clear();
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load(i, begin + i);
        for (int k = begin; k < end; k += AHEAD)
#pragma unroll
            for (int i = 0; i < AHEAD; ++i)
                if (k + i < end) {
#pragma unroll
                    for (int n = 0; n < N; ++n)
                        sum.template add_block<F16>(n, weights[i], inputs[i][n]);
                    load(i, k + i + AHEAD);
                }
#pragma unroll
        for (int i = 0; i < 8 * N; ++i) {
            const int m = i / 4 / N, n = i / 4 % N;
            sums[warp][sum.token(n, i % 4, lane)][sum.row(m, i % 4, lane)] = sum.of[m][n][i % 4];
        }
        ALL_ARE_HERE();
        const int count = min(slices - round, DECODE_WARPS);
#pragma unroll
        for (int n = 0; n < N; ++n)
            for (int s = 0; s < count; ++s)
                totals[n] = __fadd_rn(totals[n], sums[s][warp + 8 * n][lane]);
        if (round + DECODE_WARPS < slices) ALL_ARE_HERE();
    }
    const int row = row_tile * TILE + lane;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const int token = first + warp + 8 * n;
        if (row < rows && token < tokens) out[map.output(token) * rows + row] = totals[n];
    }
}

// A tile of k of the operands of a thread block.
struct Stage {
    uint4 w[PREFILL_ROWS / TILE][4][TILE + PAD];
    uint4 x[4][PREFILL_TOKENS + PAD];
};

template <bool F16, class Map>
__device__ __forceinline__ void prefill_mma(
    const uint4* w, const u16* x, float* out, int rows, int cols, int tokens, int first, Map map) {
    constexpr int N = 8, SLICE_TILES = MMA_SLICE / TILE;
    __shared__ Stage stages[STAGES];
    const int tid = threadIdx.x, lane = tid % WARP, g = lane / 4, t = lane % 4;
    const int half = tid / WARP % 2, first_of_warp = tid / WARP / 2 * 8 * N;
    const int tiles = (cols + TILE - 1) / TILE, row_tiles = (rows + TILE - 1) / TILE;
    // This thread's words of a stage: row and token `tid / 4` and every 32nd from there, plane `tid % 4`.
    const int plane = tid % 4, index = tid / 4;
    const uint4* weights_from =
        w + (u64)blockIdx.y * (PREFILL_ROWS / TILE) * tiles * TILE_WORDS + tid;
    const u16* inputs_from = x + (u64)(first + index) * cols + plane * 8;
    auto input = [&](int i) {
        if constexpr (Map::ARE_IN_ORDER) return inputs_from + (u64)(32 * i) * cols;
        return x + map.input(first + index + 32 * i) * cols + plane * 8;
    };
    auto load = [&](int k) {
        Stage& stage = stages[k % STAGES];
#pragma unroll
        for (int i = 0; i < PREFILL_ROWS / TILE; ++i) {
            const bool is_there = (int)blockIdx.y * (PREFILL_ROWS / TILE) + i < row_tiles;
            const u64 at = is_there ? ((u64)i * tiles + k) * TILE_WORDS : 0;
            copy_async(&stage.w[i][tid / TILE][tid % TILE], weights_from + at, is_there);
        }
#pragma unroll
        for (int i = 0; i < PREFILL_TOKENS / 32; ++i) {
            const bool is_there = first + index + 32 * i < tokens && k * TILE + plane * 8 < cols;
            const u16* from = is_there ? input(i) + k * TILE : x;
            copy_async(&stage.x[plane][index + 32 * i], from, is_there);
        }
    };
    Sums<N> sum, total;
    sum.clear();
    total.clear();
#pragma unroll
    for (int k = 0; k < STAGES - 1; ++k) {
        if (k < tiles) load(k);
        commit_copies();
    }
#pragma unroll 1
    for (int k = 0; k < tiles; ++k) {
        wait_for_copies_but_one();
        ALL_ARE_HERE();
        if (k + STAGES - 1 < tiles) load(k + STAGES - 1);
        commit_copies();
        const Stage& stage = stages[k % STAGES];
        uint4 weights[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) weights[r] = stage.w[half][t][g + 8 * r];
#pragma unroll
        for (int n = 0; n < N; ++n)
            sum.template add_block<F16>(n, weights, stage.x[t][first_of_warp + 8 * n + g]);
        if ((k + 1) % SLICE_TILES != 0 && k + 1 != tiles) continue;
#pragma unroll
        for (int i = 0; i < 8 * N; ++i) {
            float& element = total.of[i / 4 / N][i / 4 % N][i % 4];
            element = __fadd_rn(element, sum.of[i / 4 / N][i / 4 % N][i % 4]);
        }
        sum.clear();
    }
#pragma unroll
    for (int i = 0; i < 8 * N; ++i) {
        const int m = i / 4 / N, n = i / 4 % N;
        const int row = blockIdx.y * PREFILL_ROWS + half * TILE + sum.row(m, i % 4, lane);
        const int token = first + first_of_warp + sum.token(n, i % 4, lane);
        if (row < rows && token < tokens) out[map.output(token) * rows + row] = total.of[m][n][i % 4];
    }
}

// w packed, x (tokens, cols) as 16-bit patterns, out (tokens, rows). Decode: grid (groups of 8 or 32
// tokens, tiles of 32 rows), block 256. Prefill: grid (tiles of 128 tokens, tiles of 64 rows), block
// 128, and cols a multiple of 8. Tokens come first, so that thread blocks with the same weights run
// side by side.
#define DECODE(name, is_f16, groups, ahead)                                                     \
    extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP) name(                     \
        const uint4* w, const u16* x, float* out, int rows, int cols, int tokens) {             \
        decode_mma<is_f16, groups, ahead>(w, x, out, rows, cols, tokens, blockIdx.y,            \
                                          blockIdx.x * 8 * groups, Rows{});                     \
    }
#define PREFILL(name, is_f16)                                                                   \
    extern "C" __global__ void __launch_bounds__(PREFILL_WARPS * WARP, 2) name(                 \
        const uint4* w, const u16* x, float* out, int rows, int cols, int tokens) {             \
        prefill_mma<is_f16>(w, x, out, rows, cols, tokens, blockIdx.x * PREFILL_TOKENS, Rows{}); \
    }
DECODE(decode_mma_bf16_8, false, 1, 3)
DECODE(decode_mma_bf16_32, false, 4, 2)
DECODE(decode_mma_f16_8, true, 1, 3)
DECODE(decode_mma_f16_32, true, 4, 2)
PREFILL(prefill_mma_bf16, false)
PREFILL(prefill_mma_f16, true)

// Products of chosen experts, as in experts.cu: a thread block is 32 rows of one slot, which is one
// column of the mma; the other seven are zeros. w (experts, packed rows and cols); out (tokens * used,
// rows). grid (tiles of 32 rows, tokens * used), block 256.
#define EXPERT(name, is_f16)                                                                       \
    extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP) name(                        \
        const uint4* w, const u32* chosen, const u16* x, float* out, int rows, int cols, int used, \
        int shared_input) {                                                                        \
        const u64 slot = blockIdx.y, words = (u64)((rows + TILE - 1) / TILE) *                     \
                                             ((cols + TILE - 1) / TILE) * TILE_WORDS;              \
        const u16* input = x + (shared_input ? slot / used : slot) * cols;                         \
        decode_mma<is_f16, 1, 3>(w + chosen[slot] * words, input, out + slot * rows, rows, cols, 1, \
                                 blockIdx.x, 0, Rows{});                                           \
    }
EXPERT(expert_mma_bf16, false)
EXPERT(expert_mma_f16, true)

// The same for slots that are grouped by expert (group_slots of experts.cu): a tile of up to 32 or 128
// slots of one expert, whose weights are read once for all of them. grid (tiles, tiles of 32 or 64
// rows), block 256 or 128; tiles without slots end at once. With 128, cols is a multiple of 8.
#define GROUPED_ARGUMENTS                                                                          \
    const uint4 *w, const u16 *x, float *out, const u32 *slots, const SlotTile *tiles, int rows,   \
        int cols, int used
#define GROUPED_TILE                                                                               \
    const SlotTile tile = tiles[blockIdx.x];                                                       \
    if (tile.count == 0) return;                                                                   \
    const u64 words = (u64)((rows + TILE - 1) / TILE) * ((cols + TILE - 1) / TILE) * TILE_WORDS;   \
    const Slots map = {slots + tile.first, used};
#define GROUPED_DECODE(name, is_f16)                                                               \
    extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP) name(GROUPED_ARGUMENTS) {    \
        GROUPED_TILE                                                                               \
        decode_mma<is_f16, 4, 2>(w + tile.expert * words, x, out, rows, cols, tile.count,          \
                                 blockIdx.y, 0, map);                                              \
    }
#define GROUPED_PREFILL(name, is_f16)                                                              \
    extern "C" __global__ void __launch_bounds__(PREFILL_WARPS * WARP, 2) name(GROUPED_ARGUMENTS) { \
        GROUPED_TILE                                                                               \
        prefill_mma<is_f16>(w + tile.expert * words, x, out, rows, cols, tile.count, 0, map);      \
    }
GROUPED_DECODE(grouped_mma_bf16_32, false)
GROUPED_DECODE(grouped_mma_f16_32, true)
GROUPED_PREFILL(grouped_mma_bf16_128, false)
GROUPED_PREFILL(grouped_mma_f16_128, true)
