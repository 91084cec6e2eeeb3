// What kernels share: widening of 16-bit floats, Philox, block reductions. No CUDA headers, so that
// NVRTC, nvcc and the host shim compile the same text.
#pragma once
#if defined(CUDA_HOST_SHIM)
#include "host/shim.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define FULL 0xffffffffu

// The exact f32 of a bf16 or f16 pattern.
__device__ __forceinline__ float widen(u16 bits, bool is_f16) {
    if (!is_f16) return __uint_as_float((u32)bits << 16);
    u32 sign = (u32)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00)  // infinity or NaN
        return __uint_as_float(sign | 0x7f800000u | ((magnitude & 0x3ff) << 13));
    // Rebased by 2^112, which also normalises subnormals.
    float rebased = __fmul_rn(__uint_as_float(magnitude << 13), __uint_as_float(239u << 23));
    return __uint_as_float(sign | __float_as_uint(rebased));
}

// Orders by logit, then by lower id; larger is better. -0 and +0 compare equal.
__device__ __forceinline__ u64 key_of(float logit, u32 id) {
    u32 bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    u32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (0xffffffffu - id);
}

__device__ __forceinline__ float logit_of(u64 key) {
    u32 ordered = (u32)(key >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Philox4x32-10 (Salmon et al., 2011).
__device__ __forceinline__ void philox(u64 key, u32 c[4]) {
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u64 a = (u64)0xd2511f53u * c[0], b = (u64)0xcd9e8d57u * c[2];
        u32 n0 = (u32)(b >> 32) ^ c[1] ^ k0, n2 = (u32)(a >> 32) ^ c[3] ^ k1;
        c[0] = n0;
        c[1] = (u32)b;
        c[2] = n2;
        c[3] = (u32)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        value += __shfl_xor_sync(FULL, value, offset);
    return value;
}
