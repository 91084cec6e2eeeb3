// Sketch and exact hash of final-norm rows: the twin of proof/residue.rs, bit for bit.
//
//   q_c = clamp(rne(h_c * 2^(e_c + 8)) - mu_c),  s_j = sum_c +-q_c,  z_j = residue of s_j
//   x   = sum_c mix(key + position * STEP + (c << 16 | bits_c))
//
// grid (rows), block 128. One thread takes blocks of 32 channels, which share one Philox call per
// four projections. Integer from the first rounding on, so the order of additions does not matter.
// No allocation, no atomics, no host synchronisation: it may be captured in a CUDA graph; a row
// whose slot is negative is skipped. Never timed on a card.
#include "common.cuh"

#define THREADS 128
#define CHANNELS 32
#define DOMAIN 0x7369676eu
#define STEP 0x9e3779b97f4a7c15ULL

// One row of the table: keys, position, and where the results go.
struct Entry {
    u64 sketch_key, exact_key;
    u32 position;
    int slot;
};

__device__ __forceinline__ u64 mix(u64 x) {
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdULL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ (x >> 33);
}

__device__ __forceinline__ int whiten(float x, signed char exponent, short mean) {
    float scaled = __fmul_rn(x, __uint_as_float((u32)(127 + 8 + exponent) << 23));
    bool is_finite = (__float_as_uint(scaled) & 0x7f800000u) != 0x7f800000u;
    float bounded = is_finite ? fminf(fmaxf(scaled, -65535.0f), 65535.0f) : 0.0f;
    float centred = __fadd_rn(rintf(bounded), -(float)mean);
    return (int)fminf(fmaxf(centred, -32767.0f), 32767.0f);
}

// rows (n, channels) as 16-bit patterns; results by slot: sketches (4 bytes as u32), hashes.
// `shift` is the profile's own, projections 4 (of 8 bits) or 8 (of 4 bits).
extern "C" __global__ void __launch_bounds__(THREADS) sketch_rows(
    const u16* rows, const signed char* exponents, const short* means, const Entry* table,
    u32* sketches, u64* hashes, int channels, int shift, int projections, int is_f16) {
    const Entry entry = table[blockIdx.x];
    const u16* row = rows + (u64)blockIdx.x * channels;
    const int tid = threadIdx.x;
    const u64 base = entry.exact_key + entry.position * STEP;
    int sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    u64 hash = 0;
    for (int block = tid; block * CHANNELS < channels && entry.slot >= 0; block += THREADS) {
        u32 signs[8];
        for (int half = 0; half * 4 < projections; ++half) {
            u32 counter[4] = {entry.position, (u32)block, (u32)half, DOMAIN};
            philox(entry.sketch_key, counter);
            for (int j = 0; j < 4; ++j) signs[half * 4 + j] = counter[j];
        }
        for (int i = 0; i < CHANNELS; ++i) {
            int c = block * CHANNELS + i;
            if (c >= channels) break;
            int q = whiten(widen(row[c], is_f16), exponents[c], means[c]);
#pragma unroll
            for (int j = 0; j < 8; ++j)
                if (j < projections) sums[j] += (signs[j] >> i) & 1 ? q : -q;
            hash += mix(base + ((u64)c << 16 | row[c]));
        }
    }
    __shared__ int partial_sums[THREADS / WARP][8];
    __shared__ u64 partial_hashes[THREADS / WARP];
    const int warp = tid / WARP, lane = tid % WARP;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        int sum = warp_sum(sums[j]);
        if (lane == 0) partial_sums[warp][j] = sum;
    }
    hash = warp_sum(hash);
    if (lane == 0) partial_hashes[warp] = hash;
    __syncthreads();
    if (tid != 0 || entry.slot < 0) return;
    const int bits = projections == 4 ? 8 : 4;
    const int half_step = shift == 0 ? 0 : 1 << (shift - 1);
    u32 packed = 0;
    for (int j = 0; j < projections; ++j) {
        int sum = 0;
        for (int w = 0; w < THREADS / WARP; ++w) sum += partial_sums[w][j];
        u32 residue = (u32)((sum + half_step) >> shift) & ((1u << bits) - 1);
        packed |= residue << (j * bits);
    }
    sketches[entry.slot] = packed;
    u64 total = 0;
    for (int w = 0; w < THREADS / WARP; ++w) total += partial_hashes[w];
    hashes[entry.slot] = total;
}
