// Steps of tensor cores (mma.sync.m16n8k16, bf16 or f16 in, f32 out), and the sums of a warp.
#pragma once
#include "canon.cuh"

// d += a * b for a tile of 16 rows by 8 tokens, 16 elements of k.
template <bool F16>
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if defined(CUDA_HOST_SHIM)
    const u32 operands[6] = {a0, a1, a2, a3, b0, b1};
    shim_mma(d, operands, [](u32 bits) { return widen((u16)bits, F16); });
#else
    if (F16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Sums of 32 rows by 8 N tokens: rows g, g + 8 of half m, tokens 8 n + 2 t and the next.
template <int N>
struct Sums {
    float of[2][N][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 8 * N; ++i) of[i / 4 / N][i / 4 % N][i % 4] = 0.0f;
    }

    // A block of k for eight tokens: `w` rows g, g + 8, g + 16, g + 24, `x` token g + 8 n, elements 8 t
    // to 8 t + 7.
    template <bool F16>
    __device__ __forceinline__ void add_block(int n, const uint4 (&w)[4], uint4 x) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
            mma<F16>(of[m][n], w[2 * m].x, w[2 * m + 1].x, w[2 * m].y, w[2 * m + 1].y, x.x, x.y);
#pragma unroll
        for (int m = 0; m < 2; ++m)
            mma<F16>(of[m][n], w[2 * m].z, w[2 * m + 1].z, w[2 * m].w, w[2 * m + 1].w, x.z, x.w);
    }

    // Row and token of an element.
    static __device__ __forceinline__ int row(int m, int i, int lane) { return 16 * m + i / 2 * 8 + lane / 4; }
    static __device__ __forceinline__ int token(int n, int i, int lane) { return 8 * n + lane % 4 * 2 + i % 2; }
};
