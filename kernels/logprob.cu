// Reductions of rows of logits: the twin of ops/logits.rs, one pass and no softmax buffer.
//
// Per row: largest logit, sum of exp((x - max) / T), the target's logit and rank, the rank of the
// best stop id, and the k largest logits with their ids. Ranks and the top-k are exact (ties go to
// the lower id); the sum is f32 in another order than the CPU's, so log-probabilities agree to
// about 1e-5.
//
// grid (rows), block 256, dynamic shared memory 256 * k * 8 bytes. Each thread keeps the k best of
// its stride; the block then takes the best head k times. Never timed on a card.
#include "common.cuh"

#define THREADS 256
#define WARPS (THREADS / WARP)
#define NOTHING __uint_as_float(0xff800000u)  // -infinity

extern __shared__ u64 heap[];  // (THREADS, k): keys, largest first

// Results of one row.
struct Result {
    float max, sum, target_logit;
    u32 target_rank, stop_rank;
};

extern "C" __global__ void __launch_bounds__(THREADS) reduce_logits(
    const float* logits, const int* targets, const int* stop_ids, Result* results, u32* top_ids,
    float* top_logits, int vocab, int stops, int k, float inverse_temperature) {
    const float* row = logits + (u64)blockIdx.x * vocab;
    const int tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    const int target = targets[blockIdx.x];
    const float target_logit = target >= 0 ? row[target] : NOTHING;
    float stop_logit = NOTHING;
    for (int i = 0; i < stops; ++i) stop_logit = fmaxf(stop_logit, row[stop_ids[i]]);

    u64* own = heap + (u64)tid * k;
    for (int i = 0; i < k; ++i) own[i] = 0;
    float max = NOTHING, sum = 0.0f;
    u32 above_target = 0, above_stop = 0;
    for (int id = tid; id < vocab; id += THREADS) {
        float x = row[id];
        if (x > max) {
            sum *= expf((max - x) * inverse_temperature);
            max = x;
        }
        if (x > NOTHING) sum += expf((x - max) * inverse_temperature);
        else if (x != x) sum += x;  // a NaN must show
        above_target += x > target_logit;
        above_stop += x > stop_logit;
        u64 key = key_of(x, id);
        if (k > 0 && key > own[k - 1]) {
            int at = k - 1;
            for (; at > 0 && own[at - 1] < key; --at) own[at] = own[at - 1];
            own[at] = key;
        }
    }

    __shared__ float maxima[WARPS], sums[WARPS];
    __shared__ u32 counts[WARPS][2];
    __shared__ u64 best[WARPS];
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        float other_max = __shfl_xor_sync(FULL, max, offset);
        float other_sum = __shfl_xor_sync(FULL, sum, offset);
        float joint = fmaxf(max, other_max);
        float mine = max > NOTHING ? expf((max - joint) * inverse_temperature) : 0.0f;
        float theirs = other_max > NOTHING ? expf((other_max - joint) * inverse_temperature) : 0.0f;
        sum = (sum != sum || other_sum != other_sum) ? sum + other_sum : sum * mine + other_sum * theirs;
        max = joint;
    }
    above_target = warp_sum(above_target);
    above_stop = warp_sum(above_stop);
    if (lane == 0) {
        maxima[warp] = max;
        sums[warp] = sum;
        counts[warp][0] = above_target;
        counts[warp][1] = above_stop;
    }
    __syncthreads();
    if (tid == 0) {
        Result r = {NOTHING, 0.0f, target_logit, 1, 1};
        for (int w = 0; w < WARPS; ++w) r.max = fmaxf(r.max, maxima[w]);
        for (int w = 0; w < WARPS; ++w) {
            float scale = maxima[w] > NOTHING ? expf((maxima[w] - r.max) * inverse_temperature) : 0.0f;
            r.sum += sums[w] != sums[w] ? sums[w] : sums[w] * scale;
            r.target_rank += counts[w][0];
            r.stop_rank += counts[w][1];
        }
        if (target < 0) r.target_rank = 0;
        if (stops == 0) r.stop_rank = 0;
        results[blockIdx.x] = r;
    }

    int head = 0;
    for (int i = 0; i < k; ++i) {
        u64 mine = head < k ? own[head] : 0, largest = mine;
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) {
            u64 other = __shfl_xor_sync(FULL, largest, offset);
            largest = other > largest ? other : largest;
        }
        if (lane == 0) best[warp] = largest;
        __syncthreads();
        largest = best[0];
        for (int w = 1; w < WARPS; ++w) largest = best[w] > largest ? best[w] : largest;
        if (largest != 0 && mine == largest) ++head;
        if (tid == 0) {
            u64 at = (u64)blockIdx.x * k + i;
            top_ids[at] = largest ? 0xffffffffu - (u32)largest : 0xffffffffu;
            top_logits[at] = largest ? logit_of(largest) : NOTHING;
        }
        __syncthreads();
    }
}
