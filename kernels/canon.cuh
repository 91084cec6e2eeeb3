// The numeric canon on a GPU: rounding to 16 bits, the layout of packed matrices, one block of a
// product, sums in sixteen lanes, and our own exp and tanh. Every step is one IEEE operation, named
// with its rounding, so that results have the bits of ops/*.rs on every card.
#pragma once
#include "common.cuh"

// Elements of k whose products are summed together before they join an output. Another value is
// another canon: tests build it to see that they would notice.
#ifndef CANON_BLOCK
#define CANON_BLOCK 32
#endif

#define TILE 32         // rows and columns of a tile of a packed matrix
#define TILE_WORDS 128  // its 16-byte words: four planes of 32 rows by 8 columns
#define LANES 16        // of a sum over a row

#define NEG_INFINITY __uint_as_float(0xff800000u)

// f32 to bf16: nearest even, NaN stays NaN, magnitudes below 2^-50 become zero.
__device__ __forceinline__ u16 round_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) < (127u - 50u) << 23) return 0;
    if (x != x) return (u16)(bits >> 16 | 0x40);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// f32 to f16: nearest even, overflow to infinity, NaN stays NaN.
__device__ __forceinline__ u16 round_f16(float x) {
    u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (magnitude >= 143u << 23) return (u16)(sign | (x != x ? 0x7e00u : 0x7c00u));
    // Below 2^-14 the result counts units of 2^-24, which is what adding 0.5 rounds to.
    if (magnitude < 113u << 23)
        return (u16)(sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0.5f)) - 0x3f000000u));
    return (u16)(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

__device__ __forceinline__ u16 round_to(float x, bool is_f16) {
    return is_f16 ? round_f16(x) : round_bf16(x);
}

// The exact f32 of an f16 pattern, in one instruction where there is one.
__device__ __forceinline__ float widen_f16(u16 bits) {
#if defined(CUDA_HOST_SHIM)
    return widen(bits, true);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

// The two values of a 32-bit word, the even element in the low half.
template <bool F16>
__device__ __forceinline__ float even_of(u32 pair) {
    return F16 ? widen_f16((u16)pair) : __uint_as_float(pair << 16);
}
template <bool F16>
__device__ __forceinline__ float odd_of(u32 pair) {
    return F16 ? widen_f16((u16)(pair >> 16)) : __uint_as_float(pair & 0xffff0000u);
}

// Where 16-byte word `plane` of row `row` lies in a tile.
__device__ __forceinline__ int tile_word(int plane, int row) { return plane * TILE + row; }

// Where element (row, k) of a packed matrix of `tiles` tiles a row lies, in 16-bit values.
__device__ __forceinline__ u64 packed_at(u64 row, int k, int tiles) {
    u64 tile = row / TILE * tiles + k / TILE;
    return (tile * TILE_WORDS + tile_word(k % TILE / 8, (int)(row % TILE))) * 8 + k % 8;
}

// Eight values of a row at k; zeros where the row ends.
__device__ __forceinline__ uint4 load_eight(const u16* row, int k, int cols) {
    if (k + 8 <= cols && cols % 8 == 0) return *(const uint4*)(row + k);
    u32 words[4] = {0, 0, 0, 0};
    for (int i = 0; i < 8 && k + i < cols; ++i) words[i / 2] |= (u32)row[k + i] << 16 * (i % 2);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// One block of a product: the chain over its even elements plus the chain over its odd ones, both
// from +0. `weights` is a row's block, `x` the other operand, widened.
template <bool F16>
__device__ __forceinline__ float block_product(const uint4 (&weights)[4], const float4* x) {
    float total = 0.0f;
#pragma unroll
    for (int first = 0; first < TILE; first += CANON_BLOCK) {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int at = first; at < first + CANON_BLOCK; at += 4) {
            const uint4 word = weights[at / 8];
            const u32 a = at % 8 ? word.z : word.x, b = at % 8 ? word.w : word.y;
            const float4 v = x[at / 4];
            even = __fmaf_rn(even_of<F16>(a), v.x, even);
            odd = __fmaf_rn(odd_of<F16>(a), v.y, odd);
            even = __fmaf_rn(even_of<F16>(b), v.z, even);
            odd = __fmaf_rn(odd_of<F16>(b), v.w, odd);
        }
        const float sum = __fadd_rn(even, odd);
        total = first == 0 ? sum : __fadd_rn(total, sum);
    }
    return total;
}

// Comparisons as the CPU's lanes make them: a NaN in the second operand stays.
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }

// e^x; zero below -86, clamped above 88, NaN stays NaN. The twin of ops/math.rs.
__device__ __forceinline__ float canon_exp(float x) {
    const float magic_number = 12582912.0f;  // 1.5 * 2^23: a sum keeps an integer in its low bits
    float clamped = larger(-86.0f, smaller(88.0f, x));
    float magic = __fmaf_rn(clamped, 1.44269504f, magic_number);
    float n = __fadd_rn(magic, -magic_number);
    float r = __fmaf_rn(n, -0.693359375f, clamped);
    r = __fmaf_rn(n, 2.12194440e-4f, r);
    float poly = 1.98756915e-4f;
    poly = __fmaf_rn(poly, r, 1.3981999507e-3f);
    poly = __fmaf_rn(poly, r, 8.3334519073e-3f);
    poly = __fmaf_rn(poly, r, 4.1665795894e-2f);
    poly = __fmaf_rn(poly, r, 1.6666665459e-1f);
    poly = __fmaf_rn(poly, r, 5.0000001201e-1f);
    float y = __fadd_rn(__fmaf_rn(poly, __fmul_rn(r, r), r), 1.0f);
    y = __uint_as_float(__float_as_uint(y) + (__float_as_uint(magic) << 23));
    // 0 * x keeps a NaN that the integer step above may have hidden.
    y = __fmaf_rn(clamped, 0.0f, y);
    return x < -86.0f ? 0.0f : y;
}

__device__ __forceinline__ float canon_tanh(float x) {
    float e = canon_exp(__fadd_rn(x, x));
    return __fadd_rn(1.0f, -__fdiv_rn(2.0f, __fadd_rn(e, 1.0f)));
}

__device__ __forceinline__ float canon_softcap(float x, float cap) {
    return __fmul_rn(canon_tanh(__fdiv_rn(x, cap)), cap);
}

// Sum of sixteen lanes in the fixed tree, for lane 0 of each half of a warp; all 32 lanes call it.
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
    for (int half = LANES / 2; half > 0; half /= 2)
        value = __fadd_rn(value, __shfl_down_sync(FULL, value, half, LANES));
    return value;
}

// `1 / sqrt(mean of squares + eps)` of a row in shared memory; all threads of warp 0 call it.
__device__ __forceinline__ float rms_scale(const float* row, int cols, float eps, int lane) {
    float squares = 0.0f;
    if (lane < LANES)
        for (int i = lane; i < cols; i += LANES) squares = __fmaf_rn(row[i], row[i], squares);
    float mean = __fdiv_rn(__shfl_sync(FULL, lane_sum(squares), 0), (float)cols);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
}

// Which rows of inputs and outputs the tokens of a product are: token t is row t,
struct Rows {
    static constexpr bool ARE_IN_ORDER = true;
    __device__ __forceinline__ u64 input(int t) const { return t; }
    __device__ __forceinline__ u64 output(int t) const { return t; }
};

// or a slot of a mixture (a token and one of its experts), whose input is its token's or its own.
struct Slots {
    static constexpr bool ARE_IN_ORDER = false;
    const u32* slots;
    int used;  // experts of a token where inputs are the tokens', else 1
    __device__ __forceinline__ u64 input(int t) const { return slots[t] / used; }
    __device__ __forceinline__ u64 output(int t) const { return slots[t]; }
};

// Slots that one thread block takes: `count` of one expert, from place `first` of the grouped slots.
struct SlotTile {
    u32 expert, first, count, unused;
};
