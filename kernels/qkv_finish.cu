// What happens to queries, keys and values after their product: the twin of Decoder::finish_qkv and
// KvCache::store.
//
//   x += bias;  x = norm(x) where heads are normed;  x = rotate(x) for queries and keys;  round, store
//
// Rotation in the half-split form: a' = a cos - b sin, b' = b cos + a sin, one product rounded and
// one fused, from tables of the rows of the step that the host computed in f64. Keys and values go to
// the paged cache. A layer's keys are (blocks, kv_heads, tiles, 4, 32, 8): a head's 32 positions are
// a packed matrix of 32 rows, as scores read them. Its values are (blocks, kv_heads, 32, head_dim); or,
// with `packs_values`, (blocks, kv_heads, tiles, 4, 32, 8): a packed matrix with a row for each dimension
// and a column for each position, as attend_tensor.cu reads them.
// Columns that fill up a tile are never written: the cache starts as zeros.
//
// grid (rows, heads + 2 * kv_heads), block 128. Per row 4 bytes read and 2 written for each value:
// at 8B (6144) 36 KiB, so a launch's time (about 3 us) for a decode batch. Never timed on a card.
#include "canon.cuh"

#define THREADS 128
#define HEAD_DIM_MAX 256

// `slots` names a row's place in the cache: 32 * block + position mod 32. cos and sin are
// (rows, head_dim / 2); bias (row_len), norms (head_dim), each null where the model has none.
extern "C" __global__ void __launch_bounds__(THREADS) qkv_finish(
    const float* qkv, const float* bias, const float* q_norm, const float* k_norm, const float* cos,
    const float* sin, const u32* slots, u16* queries, u16* keys, u16* values, int heads, int kv_heads,
    int head_dim, float eps, int is_f16, int packs_values) {
    __shared__ float head[HEAD_DIM_MAX];
    __shared__ float scale;
    const int tid = threadIdx.x, index = blockIdx.y, half = head_dim / 2;
    const int row_len = (heads + 2 * kv_heads) * head_dim;
    const u64 row = blockIdx.x;
    const float* from = qkv + row * row_len + index * head_dim;
    for (int d = tid; d < head_dim; d += THREADS)
        head[d] = bias ? __fadd_rn(from[d], bias[index * head_dim + d]) : from[d];
    __syncthreads();
    const bool is_query = index < heads, is_value = index >= heads + kv_heads;
    const float* norm = is_value ? nullptr : is_query ? q_norm : k_norm;
    if (norm) {
        if (tid < WARP) {
            float found = rms_scale(head, head_dim, eps, tid);
            if (tid == 0) scale = found;
        }
        __syncthreads();
        for (int d = tid; d < head_dim; d += THREADS)
            head[d] = __fmul_rn(__fmul_rn(head[d], scale), norm[d]);
        __syncthreads();
    }
    if (!is_value) {
        for (int i = tid; i < half; i += THREADS) {
            const float a = head[i], b = head[half + i];
            const float c = cos[row * half + i], s = sin[row * half + i];
            head[i] = __fmaf_rn(a, c, __fadd_rn(0.0f, -__fmul_rn(b, s)));
            head[half + i] = __fmaf_rn(b, c, __fmul_rn(a, s));
        }
        __syncthreads();
    }
    const u64 block = slots[row] / TILE;
    const int slot = slots[row] % TILE, tiles = (head_dim + TILE - 1) / TILE;
    const int kv_head = is_value ? index - heads - kv_heads : index - heads;
    for (int d = tid; d < head_dim; d += THREADS) {
        const u16 bits = round_to(head[d], is_f16);
        if (is_query)
            queries[(row * heads + index) * head_dim + d] = bits;
        else if (is_value && packs_values)
            values[(block * kv_heads + kv_head) * tiles * TILE * TILE + packed_at(d, slot, 1)] = bits;
        else if (is_value)
            values[((block * kv_heads + kv_head) * TILE + slot) * head_dim + d] = bits;
        else
            keys[(block * kv_heads + kv_head) * tiles * TILE * TILE + packed_at(slot, d, tiles)] = bits;
    }
}
