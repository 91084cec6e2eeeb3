// Mixtures of experts: the twin of models/moe.rs.
//
// route: softmax of the router's scores (exponentials relative to the largest, summed in ascending
// order), the `used` largest, ties to the lower number, in ascending order; their weights, divided by
// their sum where the family renormalises. One warp a token.
//
// group_slots: the slots of each expert one behind the other, cut into tiles, so that grouped_* of
// matmul_portable.cu and grouped_mma_* of matmul_tensor.cu read an expert's weights once a tile. In which
// order an expert's slots lie is left to the hardware: no sum goes over them.
//
// expert_*: a product for each (token, chosen expert) in the order of the canon, for a step of one row,
// whose slots have no expert in common. A thread block is 32 rows of one slot. With `shared_input` slots
// of a token read one input row (gate and up), else each its own (down).
//
// combine: out[t] = ((0 + w_0 y_0) + w_1 y_1) + ..., each product rounded, experts ascending.
//
// Bytes of a token's products: used * 64 * rows * cols / 32: Mixtral 8x7B at batch 1 reads two experts
// of 352 MB a layer, 0.21 ms at 3.35 TB/s. Never timed on a card.
#include "canon.cuh"

#ifdef CONTROL_NO_BARRIER
#define SUMS_ARE_WRITTEN()
#else
#define SUMS_ARE_WRITTEN() __syncthreads()
#endif

#define EXPERT_WARPS 8
#define EXPERTS_MAX 256

// scores (tokens, experts); chosen and weights (tokens, used). grid (tokens), block 32.
extern "C" __global__ void __launch_bounds__(WARP) route(
    const float* scores, u32* chosen, float* weights, int experts, int used, int renormalise) {
    __shared__ float probabilities[EXPERTS_MAX];
    __shared__ int is_chosen[EXPERTS_MAX];
    const float* row = scores + (u64)blockIdx.x * experts;
    const int lane = threadIdx.x;
    float max = NEG_INFINITY;
    for (int e = lane; e < experts; e += WARP) max = fmaxf(max, row[e]);
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        max = fmaxf(max, __shfl_xor_sync(FULL, max, offset));
    for (int e = lane; e < experts; e += WARP) {
        probabilities[e] = canon_exp(__fadd_rn(row[e], -max));
        is_chosen[e] = 0;
    }
    __syncwarp();
    float total = 0.0f;
    for (int e = 0; e < experts; ++e) total = __fadd_rn(total, probabilities[e]);
    __syncwarp();
    for (int e = lane; e < experts; e += WARP) probabilities[e] = __fdiv_rn(probabilities[e], total);
    __syncwarp();
    for (int round = 0; round < used; ++round) {
        u64 best = 0;
        for (int e = lane; e < experts; e += WARP)
            if (!is_chosen[e]) {
                const u64 key = key_of(probabilities[e], e);
                best = key > best ? key : best;
            }
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            const u64 other = __shfl_xor_sync(FULL, best, offset);
            best = other > best ? other : best;
        }
        if (lane == 0) is_chosen[0xffffffffu - (u32)best] = 1;
        __syncwarp();
    }
    if (lane != 0) return;
    float scale = 0.0f;
    for (int e = 0; e < experts; ++e)
        if (is_chosen[e]) scale = __fadd_rn(scale, probabilities[e]);
    if (!renormalise) scale = 1.0f;
    int slot = 0;
    for (int e = 0; e < experts; ++e)
        if (is_chosen[e]) {
            chosen[(u64)blockIdx.x * used + slot] = e;
            weights[(u64)blockIdx.x * used + slot++] = __fdiv_rn(probabilities[e], scale);
        }
}

// chosen (slots); grouped (slots): the slots, by expert; tiles (tile_count): up to `size` slots of an
// expert each, ascending experts, then empty ones. grid 1, block 256, at most 256 experts. 12 bytes a
// slot, two passes over them: 4096 slots are 32 turns of a thread, about 10 us.
extern "C" __global__ void __launch_bounds__(EXPERTS_MAX) group_slots(
    const u32* chosen, u32* grouped, SlotTile* tiles, int slots, int size, int tile_count) {
    __shared__ u32 counts[EXPERTS_MAX], next[EXPERTS_MAX];
    __shared__ int used_tiles;
    const int expert = threadIdx.x;
    counts[expert] = 0;
    SUMS_ARE_WRITTEN();
    for (int slot = threadIdx.x; slot < slots; slot += EXPERTS_MAX) atomicAdd(&counts[chosen[slot]], 1u);
    SUMS_ARE_WRITTEN();
    u32 first = 0;
    int tile = 0;
    for (int e = 0; e < expert; ++e) {
        first += counts[e];
        tile += (counts[e] + size - 1) / size;
    }
    next[expert] = first;
    const u32 end = first + counts[expert];
    for (; first < end; first += size) tiles[tile++] = {(u32)expert, first, min(end - first, (u32)size), 0};
    if (expert == EXPERTS_MAX - 1) used_tiles = tile;
    SUMS_ARE_WRITTEN();
    for (int i = used_tiles + threadIdx.x; i < tile_count; i += EXPERTS_MAX) tiles[i] = {0, 0, 0, 0};
    for (int slot = threadIdx.x; slot < slots; slot += EXPERTS_MAX)
        grouped[atomicAdd(&next[chosen[slot]], 1u)] = slot;
}

// w (experts, packed rows and cols); out (tokens * used, rows). As decode of matmul_portable.cu for
// one token, without its prefetch.
template <bool F16>
__device__ __forceinline__ void expert_product(
    const uint4* w, const u32* chosen, const u16* x, float* out, int rows, int cols, int used,
    int shared_input) {
    __shared__ float4 inputs[EXPERT_WARPS][TILE / 4];
    __shared__ float sums[2][EXPERT_WARPS][TILE];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int tiles = (cols + TILE - 1) / TILE, row_tiles = (rows + TILE - 1) / TILE;
    const u64 slot = blockIdx.y;
    const uint4* from = w + ((u64)chosen[slot] * row_tiles + blockIdx.x) * tiles * TILE_WORDS;
    const u16* input = x + (shared_input ? slot / used : slot) * cols;
    float total = 0.0f;
    for (int first = 0, turn = 0; first < tiles; first += EXPERT_WARPS, turn ^= 1) {
        const int k = first + warp;
        if (k < tiles) {
            uint4 word[4];
#pragma unroll
            for (int plane = 0; plane < 4; ++plane)
                word[plane] = __ldg(from + (u64)k * TILE_WORDS + tile_word(plane, lane));
            const u16 bits = k * TILE + lane < cols ? input[k * TILE + lane] : 0;
            ((float*)inputs[warp])[lane] = even_of<F16>(bits);
            __syncwarp();
            sums[turn][warp][lane] = block_product<F16>(word, inputs[warp]);
            __syncwarp();
        }
        SUMS_ARE_WRITTEN();
        if (warp == 0)
            for (int b = 0; b < min(EXPERT_WARPS, tiles - first); ++b)
                total = __fadd_rn(total, sums[turn][b][lane]);
    }
    const int row = blockIdx.x * TILE + lane;
    if (warp == 0 && row < rows) out[slot * rows + row] = total;
}

// grid (tiles of 32 rows, tokens * used), block 256.
#define EXPERT(name, is_f16)                                                                        \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS * WARP) name(                         \
        const uint4* w, const u32* chosen, const u16* x, float* out, int rows, int cols, int used,  \
        int shared_input) {                                                                         \
        expert_product<is_f16>(w, chosen, x, out, rows, cols, used, shared_input);                  \
    }
EXPERT(expert_bf16, false)
EXPERT(expert_f16, true)

// y (tokens * used, hidden), out (tokens, hidden). grid (tokens), block 256.
extern "C" __global__ void __launch_bounds__(256) combine(
    const float* y, const float* weights, float* out, int hidden, int used) {
    const u64 first = (u64)blockIdx.x * used;
    for (int c = threadIdx.x; c < hidden; c += 256) {
        float sum = 0.0f;
        for (int slot = 0; slot < used; ++slot)
            sum = __fadd_rn(sum, __fmul_rn(weights[first + slot], y[(first + slot) * hidden + c]));
        out[(u64)blockIdx.x * hidden + c] = sum;
    }
}
