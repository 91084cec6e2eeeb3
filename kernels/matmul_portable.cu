// Matrix products in the order of the canon on CUDA cores: the twin of ops/matmul.rs, bit for bit.
//
//   out[t][r] = ((0 + s_0) + s_1) + ...,   s_b = even_b + odd_b over 32 elements of k,
//   even_b, odd_b = chains of fused multiply-adds from +0 over w[r][k] * x[t][k], k even, k odd
//
// Weights are packed in tiles of 32 rows by 32 k, each stored as four planes of 32 rows by 8 k: a
// warp's 16-byte loads are 512 contiguous bytes, and a thread holds its row's whole block of k.
// Rows and k are padded with zeros, which change no bit: a chain that begins at +0 keeps its value
// when a product of zeros is added.
//
// Decode (up to 8 tokens a thread block, 32 rows): warps take blocks of k in turn, two tiles ahead in
// registers; block sums meet in shared memory and one warp adds them in ascending order while the
// others go on. Per tile 2 KiB of weights, and per token 64 bytes of input, 1024 FMA and 32 additions.
// The roof is memory: 16 GB at 3.35 TB/s are 4.8 ms. A warp issues about 78 instructions for a tile of
// one token and 41 for each further one, so an H100 (528 schedulers at 1.7 GHz) is 14 % busy at one
// token and as busy with FMA as with memory near eight.
//
// Prefill (64 tokens by 64 rows a thread block): all k in order, 4 rows by 8 tokens a thread, 32 FMA
// for three 16-byte loads from shared memory. The roof is arithmetic: 30 T FMA/s on an H100, so 8 G
// weights cost 0.27 ms a token. Bytes: 64 for each row and each token of a block of k.
//
// Never timed on a card.
#include "canon.cuh"

#define DECODE_WARPS 8
#define PREFILL_THREADS 128
#define PREFILL_TILE 64

#ifdef CONTROL_NO_BARRIER
#define SUMS_ARE_WRITTEN()
#else
#define SUMS_ARE_WRITTEN() __syncthreads()
#endif

// The four words of this lane's row in tile `k` of a row of tiles; zeros past the end.
__device__ __forceinline__ void load_tile(uint4 (&to)[4], const uint4* row_tiles, int k, int tiles, int lane) {
#pragma unroll
    for (int plane = 0; plane < 4; ++plane)
        to[plane] = k < tiles ? __ldg(row_tiles + (u64)k * TILE_WORDS + tile_word(plane, lane))
                              : make_uint4(0, 0, 0, 0);
}

template <bool F16, int T, class Map>
__device__ __forceinline__ void decode(
    const uint4* w, const u16* x, float* out, int rows, int cols, int tokens, int first, Map map) {
    constexpr int TURNS = 8 / T;  // tiles that a warp takes between two barriers
    constexpr int ROUND = DECODE_WARPS * TURNS;
    __shared__ float4 inputs[DECODE_WARPS][T][TILE / 4];
    __shared__ float sums[2][ROUND][T][TILE];
    __shared__ float totals[T][TILE];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int tiles = (cols + TILE - 1) / TILE, rounds = (tiles + ROUND - 1) / ROUND;
    const uint4* row_tiles = w + (u64)blockIdx.y * tiles * TILE_WORDS;
    const int row = blockIdx.y * TILE + lane;
    uint4 now[4], next[4], after[4];
    load_tile(next, row_tiles, warp, tiles, lane);
    load_tile(after, row_tiles, warp + DECODE_WARPS, tiles, lane);
    for (int round = 0; round < rounds; ++round) {
#pragma unroll 2
        for (int turn = 0; turn < TURNS; ++turn) {
            const int k = round * ROUND + turn * DECODE_WARPS + warp;
#pragma unroll
            for (int plane = 0; plane < 4; ++plane) {
                now[plane] = next[plane];
                next[plane] = after[plane];
            }
            load_tile(after, row_tiles, k + 2 * DECODE_WARPS, tiles, lane);
            if (k >= tiles) continue;
#pragma unroll
            for (int t = 0; t < T; ++t) {
                const bool is_there = first + t < tokens && k * TILE + lane < cols;
                const u16 bits = is_there ? x[map.input(first + t) * cols + k * TILE + lane] : 0;
                ((float*)inputs[warp][t])[lane] = even_of<F16>(bits);
            }
            __syncwarp();
#pragma unroll
            for (int t = 0; t < T; ++t)
                sums[round % 2][turn * DECODE_WARPS + warp][t][lane] =
                    block_product<F16>(now, inputs[warp][t]);
            __syncwarp();
        }
        SUMS_ARE_WRITTEN();
        const int count = tiles - round * ROUND < ROUND ? tiles - round * ROUND : ROUND;
        for (int t = (warp + round) % DECODE_WARPS; t < T; t += DECODE_WARPS) {
            float total = round == 0 ? 0.0f : totals[t][lane];
            for (int b = 0; b < count; ++b) total = __fadd_rn(total, sums[round % 2][b][t][lane]);
            totals[t][lane] = total;
            if (round + 1 == rounds && row < rows && first + t < tokens)
                out[map.output(first + t) * rows + row] = total;
        }
    }
}

// Eight values of one row or token, one below the other in k.
template <bool F16>
__device__ __forceinline__ void stage(float (*to)[PREFILL_TILE], int plane, int at, uint4 word) {
    const u32 pairs[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[plane * 8 + 2 * i][at] = even_of<F16>(pairs[i]);
        to[plane * 8 + 2 * i + 1][at] = odd_of<F16>(pairs[i]);
    }
}

// One k of a thread's 4 rows by 8 tokens.
__device__ __forceinline__ void outer(float (&sum)[8][4], const float* w, const float* x) {
    const float4 a = *(const float4*)w, b = *(const float4*)x, c = *(const float4*)(x + 4);
    const float rows[4] = {a.x, a.y, a.z, a.w};
    const float tokens[8] = {b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[t][r] = __fmaf_rn(rows[r], tokens[t], sum[t][r]);
}

template <bool F16, class Map>
__device__ __forceinline__ void prefill(
    const uint4* w, const u16* x, float* out, int rows, int cols, int tokens, int first, Map map) {
    __shared__ __align__(16) float ws[2][TILE][PREFILL_TILE], xs[2][TILE][PREFILL_TILE];
    const int tid = threadIdx.x;
    const int tiles = (cols + TILE - 1) / TILE, row_tiles = (rows + TILE - 1) / TILE;
    const int first_row = blockIdx.y * PREFILL_TILE;
    // Words 0 to 255 of either operand: a thread takes two of each.
    uint4 weights[2], inputs[2];
    auto load = [&](int k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int word = tid + i * PREFILL_THREADS;
            const int tile = blockIdx.y * 2 + word / TILE_WORDS;
            const uint4* from = w + ((u64)tile * tiles + k) * TILE_WORDS + word % TILE_WORDS;
            weights[i] = tile < row_tiles ? __ldg(from) : make_uint4(0, 0, 0, 0);
            const int token = first + word % PREFILL_TILE, plane = word / PREFILL_TILE;
            inputs[i] = token < tokens ? load_eight(x + map.input(token) * cols, k * TILE + plane * 8, cols)
                                       : make_uint4(0, 0, 0, 0);
        }
    };
    auto keep = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int word = tid + i * PREFILL_THREADS;
            stage<F16>(ws[buffer], word % TILE_WORDS / TILE, word / TILE_WORDS * TILE + word % TILE,
                       weights[i]);
            stage<F16>(xs[buffer], word / PREFILL_TILE, word % PREFILL_TILE, inputs[i]);
        }
    };
    const int row = tid % 16 * 4, token = tid / 16 * 8;
    float totals[8][4] = {};
    load(0);
    keep(0);
    __syncthreads();
    for (int k = 0; k < tiles; ++k) {
        if (k + 1 < tiles) load(k + 1);
        const float(*wk)[PREFILL_TILE] = ws[k % 2];
        const float(*xk)[PREFILL_TILE] = xs[k % 2];
#pragma unroll 1
        for (int block = 0; block < TILE; block += CANON_BLOCK) {
            float even[8][4] = {}, odd[8][4] = {};
#pragma unroll 4
            for (int i = block; i < block + CANON_BLOCK; i += 2) {
                outer(even, &wk[i][row], &xk[i][token]);
                outer(odd, &wk[i + 1][row], &xk[i + 1][token]);
            }
#pragma unroll
            for (int t = 0; t < 8; ++t)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    totals[t][r] = __fadd_rn(totals[t][r], __fadd_rn(even[t][r], odd[t][r]));
        }
        if (k + 1 < tiles) keep((k + 1) % 2);
        SUMS_ARE_WRITTEN();
    }
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r)
            if (first + token + t < tokens && first_row + row + r < rows)
                out[map.output(first + token + t) * rows + first_row + row + r] = totals[t][r];
}

// w packed, x (tokens, cols) as 16-bit patterns, out (tokens, rows). Decode: grid (groups of T tokens,
// tiles of 32 rows), block 256. Prefill: grid (tiles of 64 tokens, tiles of 64 rows), block 128. Tokens
// come first, so that thread blocks with the same weights run side by side and share them in L2.
#define DECODE(name, is_f16, count)                                                          \
    extern "C" __global__ void __launch_bounds__(DECODE_WARPS * WARP, 2) name(               \
        const uint4* w, const u16* x, float* out, int rows, int cols, int tokens) {          \
        decode<is_f16, count>(w, x, out, rows, cols, tokens, blockIdx.x * count, Rows{});     \
    }
#define PREFILL(name, is_f16)                                                                \
    extern "C" __global__ void __launch_bounds__(PREFILL_THREADS, 3) name(                   \
        const uint4* w, const u16* x, float* out, int rows, int cols, int tokens) {          \
        prefill<is_f16>(w, x, out, rows, cols, tokens, blockIdx.x * PREFILL_TILE, Rows{});    \
    }
DECODE(decode_bf16_1, false, 1)
DECODE(decode_bf16_4, false, 4)
DECODE(decode_bf16_8, false, 8)
DECODE(decode_f16_1, true, 1)
DECODE(decode_f16_4, true, 4)
DECODE(decode_f16_8, true, 8)
PREFILL(prefill_bf16, false)
PREFILL(prefill_f16, true)

// Products of a mixture's slots, grouped by expert (group_slots of experts.cu): as above, with a tile of
// slots for a tile of tokens, so that an expert's weights are read once for up to T or 64 of them. A
// token's order of additions is that of every other kernel. w (experts, packed rows and cols), out
// (slots, rows). grid (tiles, tiles of 32 or 64 rows); tiles without slots end at once.
#define GROUPED(name, product, threads, resident)                                                   \
    extern "C" __global__ void __launch_bounds__(threads, resident) name(                           \
        const uint4* w, const u16* x, float* out, const u32* slots, const SlotTile* tiles, int rows, \
        int cols, int used) {                                                                       \
        const SlotTile tile = tiles[blockIdx.x];                                                    \
        if (tile.count == 0) return;                                                                \
        const u64 words = (u64)((rows + TILE - 1) / TILE) * ((cols + TILE - 1) / TILE) * TILE_WORDS; \
        product(w + tile.expert * words, x, out, rows, cols, tile.count, 0,                         \
                Slots{slots + tile.first, used});                                                   \
    }
#define DECODE_8(is_f16) decode<is_f16, 8>  // a comma would end the argument
GROUPED(grouped_bf16_8, DECODE_8(false), DECODE_WARPS * WARP, 2)
GROUPED(grouped_f16_8, DECODE_8(true), DECODE_WARPS * WARP, 2)
GROUPED(grouped_bf16_64, prefill<false>, PREFILL_THREADS, 3)
GROUPED(grouped_f16_64, prefill<true>, PREFILL_THREADS, 3)

// Rows of 16-bit values into tiles, tiny bf16 magnitudes flushed: `rows` rows of `from` (rows, cols)
// become rows first_row and on of the packed matrix, which was zeroed before. grid (rows), block 256.
// 4 bytes moved a weight: 16 GB are 10 ms.
extern "C" __global__ void __launch_bounds__(256) pack(
    const u16* from, u16* packed, int cols, int first_row, int is_f16) {
    const u64 row = first_row + blockIdx.x;
    const int tiles = (cols + TILE - 1) / TILE;
    for (int k = threadIdx.x; k < cols; k += 256) {
        u16 bits = from[(u64)blockIdx.x * cols + k];
        packed[packed_at(row, k, tiles)] = is_f16 ? bits : round_bf16(widen(bits, false));
    }
}
