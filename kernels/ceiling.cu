// What a card can do at most, for measurements: bytes that it reads, multiply-adds of its lanes and
// of its tensor cores (mma.sync; the larger instructions of sm_90 do more). grid (any), block 256, no
// shared memory. Each result can be computed on the host, so a measurement knows that the work was
// done. Never timed on a card.
#include "mma.cuh"

#define THREADS 256
#define CHAINS 16
#define TILES 8

// out[thread] = the xor of all words of the groups thread, thread + threads, ... of 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS) read_ceiling(const uint4* from, u32* out, u64 count) {
    const u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x, threads = (u64)gridDim.x * THREADS;
    u32 sum = 0;
    u64 i = thread;
    // Four loads are under way at once.
    for (; i + 3 * threads < count; i += 4 * threads) {
        const uint4 a = from[i], b = from[i + threads], c = from[i + 2 * threads], d = from[i + 3 * threads];
        sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < count; i += threads) {
        const uint4 a = from[i];
        sum ^= a.x ^ a.y ^ a.z ^ a.w;
    }
    out[thread] = sum;
}

// Chain j of a thread begins at lane + j and takes x <- factor * x + term, `rounds` times;
// out[thread] = the chains' sum, in order.
extern "C" __global__ void __launch_bounds__(THREADS) fma_ceiling(float* out, float factor, float term, int rounds) {
    const u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x;
    float x[CHAINS];
#pragma unroll
    for (int j = 0; j < CHAINS; ++j) x[j] = (float)((int)(threadIdx.x % WARP) + j);
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int j = 0; j < CHAINS; ++j) x[j] = __fmaf_rn(factor, x[j], term);
    }
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < CHAINS; ++j) sum = __fadd_rn(sum, x[j]);
    out[thread] = sum;
}

// Tiles of ones times ones: each element grows by 16 in a round. out[thread] = an element, or -1
// where a thread's elements differ. Exact up to 2^20 rounds.
template <bool F16>
__device__ __forceinline__ void mma_rounds(float* out, int rounds) {
    const u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x;
    const u32 one = F16 ? 0x3c003c00u : 0x3f803f80u;
    float d[TILES][4];
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) d[i / 4][i % 4] = 0.0f;
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) mma<F16>(d[tile], one, one, one, one, one, one);
    }
    float least = d[0][0], most = d[0][0];
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) {
        least = fminf(least, d[i / 4][i % 4]);
        most = fmaxf(most, d[i / 4][i % 4]);
    }
    out[thread] = least == most ? least : -1.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS) mma_ceiling_bf16(float* out, int rounds) {
    mma_rounds<false>(out, rounds);
}

extern "C" __global__ void __launch_bounds__(THREADS) mma_ceiling_f16(float* out, int rounds) {
    mma_rounds<true>(out, rounds);
}
