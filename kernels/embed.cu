// Embedding rows by token id: the twin of Decoder::embed.
//
//   out[t][c] = widen(table[ids[t]][c]) * scale
//
// The table is packed as a matrix (it is also the head) or lies row by row. grid (tokens), block
// 256, no shared memory. Per token 2 * cols bytes read and 4 * cols written: at 8B (4096 columns)
// 24 KiB, so the time is that of a launch (about 3 us) up to some hundred tokens, and memory's above.
// Never timed on a card.
#include "canon.cuh"

#define THREADS 256

// A scale of 0 means none: multiplying by 1 would quieten nothing and cost nothing, but the twin
// does not multiply.
extern "C" __global__ void __launch_bounds__(THREADS) embed(
    const u16* table, const u32* ids, float* out, int cols, int is_packed, float scale, int is_f16) {
    const u64 id = ids[blockIdx.x];
    float* row = out + (u64)blockIdx.x * cols;
    const int tiles = (cols + TILE - 1) / TILE;
    for (int c = threadIdx.x; c < cols; c += THREADS) {
        u64 at = is_packed ? packed_at(id, c, tiles) : id * cols + c;
        float x = widen(table[at], is_f16);
        row[c] = scale != 0.0f ? __fmul_rn(x, scale) : x;
    }
}
