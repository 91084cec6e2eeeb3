// RMS norm with what stands around it: the twin of ops/rowwise.rs Norm.
//
//   add_norm:  r += branch + bias (where given);  y = round(r / sqrt(mean(r^2) + eps) * weight)
//   norm_add:  b = branch + bias;                 r += b / sqrt(mean(b^2) + eps) * weight
//
// Both outputs of add_norm count: the residual stream goes on, the rounded row enters the product.
// A sum has sixteen lanes (element i goes to lane i mod 16) and one tree, as on the CPU: a chain of
// cols / 16 fused multiply-adds, which sixteen threads walk in shared memory (4096 columns: 256 steps
// of about 4 cycles, half a microsecond) while the other threads wait. grid (rows), block 256,
// dynamic shared memory 4 * cols bytes. Per row 8 * cols bytes read, 6 * cols written, cols FMA: at
// 8B 56 KiB, so a decode step of 65 norms costs launches and chains (about 3 us each, 0.2 ms), not
// bandwidth. Never timed on a card.
#include "canon.cuh"

#define THREADS 256

extern __shared__ float staged[];  // (cols)

#ifdef CONTROL_NO_BARRIER
#define ROW_IS_STAGED()
#else
#define ROW_IS_STAGED() __syncthreads()
#endif

__device__ __forceinline__ float scale_of(int cols, float eps) {
    __shared__ float scale;
    ROW_IS_STAGED();
    if (threadIdx.x < WARP) {
        float found = rms_scale(staged, cols, eps, threadIdx.x);
        if (threadIdx.x == 0) scale = found;
    }
    __syncthreads();
    return scale;
}

// residual (rows, cols) is changed in place where there is a branch; out (chosen rows, cols) as
// 16-bit patterns. `chosen` names the row of each output, or is null: all of them in order. Rows that
// are chosen twice may not have a branch.
extern "C" __global__ void __launch_bounds__(THREADS) add_norm(
    float* residual, const float* branch, const float* bias, const float* weight, const u32* chosen,
    u16* out, int cols, float eps, int is_f16) {
    const u64 from = (u64)(chosen ? chosen[blockIdx.x] : blockIdx.x) * cols;
    const u64 to = (u64)blockIdx.x * cols;
    for (int c = threadIdx.x; c < cols; c += THREADS) {
        float x = residual[from + c];
        if (branch) {
            x = __fadd_rn(x, branch[from + c]);
            if (bias) x = __fadd_rn(x, bias[c]);
            residual[from + c] = x;
        }
        staged[c] = x;
    }
    const float scale = scale_of(cols, eps);
    for (int c = threadIdx.x; c < cols; c += THREADS)
        out[to + c] = round_to(__fmul_rn(__fmul_rn(staged[c], scale), weight[c]), is_f16);
}

// residual += norm(branch + bias): the post-norms of Gemma 2.
extern "C" __global__ void __launch_bounds__(THREADS) norm_add(
    float* residual, const float* branch, const float* bias, const float* weight, int cols, float eps) {
    const u64 row = (u64)blockIdx.x * cols;
    for (int c = threadIdx.x; c < cols; c += THREADS) {
        float x = branch[row + c];
        staged[c] = bias ? __fadd_rn(x, bias[c]) : x;
    }
    const float scale = scale_of(cols, eps);
    for (int c = threadIdx.x; c < cols; c += THREADS) {
        float normed = __fmul_rn(__fmul_rn(staged[c], scale), weight[c]);
        residual[row + c] = __fadd_rn(residual[row + c], normed);
    }
}
