// What is read off a row of logits: the twin of ops/logits.rs and models/sampler.rs, bit for bit.
//
// sum_exp: the largest logit and the sum of exp((x - max) / T). The twin sums 512 elements in sixteen
// lanes of f32 and their tree, and adds those sums in f64 in ascending order. Chunks are independent
// until then: half a warp takes one. ln of the sum is one f64 function, which the host computes.
//
// draw: argmax of logit / T + Gumbel noise over the tokens that survive truncation, ties to the lower
// id, or of the logits alone where the request is greedy. u = (word + 0.5) / 2^32 with word v mod 4
// of Philox at counter (position, v / 4, 0, DOMAIN), noise = -ln(-ln u) in f64. The order of
// comparisons does not matter, and most tokens are skipped by a bound on their noise.
//
// A truncated draw takes its survivors from the k largest logits (largest, k at most 256): min-p by
// weight, then top-p by sums in descending order, as the twin does. Where k are not enough to know,
// the token is UNKNOWN and the host draws from the row.
//
// largest: keys of 64 bits (logit, then lower id) are all different, so a radix select by bytes finds
// the k-th; those above it are collected and sorted in shared memory.
//
// look_up: logits and ranks of single tokens, the drawn one among them.
//
// grid (rows), block 256. Bytes 4 * vocab a pass: sum_exp two, draw two, look_up one a token; at
// 128,256 tokens 2 MB a row, from L2; largest up to eight passes and one more. One block a row
// reaches perhaps 100 GB/s: about 20 us at batch 1, 0.4 % of a step of 8B; rows are in parallel. f64
// runs at 1/64 of the f32 rate on cards of the consumer kind, which is why noise is computed for a
// few hundred tokens only. Never timed on a card.
#include "canon.cuh"

#define THREADS 256
#define WARPS (THREADS / WARP)
#define CHUNK 512
#define DOMAIN 0x736d706cu
#define UNKNOWN 0xffffffffu
#define CANDIDATES_MAX 256

#ifdef CONTROL_NO_BARRIER
#define SUMS_ARE_WRITTEN()
#else
#define SUMS_ARE_WRITTEN() __syncthreads()
#endif

// The larger of two, a NaN in either staying; the CPU's fold keeps it too.
__device__ __forceinline__ float larger_or_nan(float a, float b) { return a != a ? a : larger(a, b); }

__device__ __forceinline__ float row_maximum(const float* row, int vocab) {
    __shared__ float maxima[WARPS];
    const int tid = threadIdx.x;
    float max = NEG_INFINITY;
    for (int v = tid; v < vocab; v += THREADS) max = larger_or_nan(max, row[v]);
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        max = larger_or_nan(max, __shfl_xor_sync(FULL, max, offset));
    if (tid % WARP == 0) maxima[tid / WARP] = max;
    __syncthreads();
    max = maxima[0];
    for (int w = 1; w < WARPS; ++w) max = larger_or_nan(max, maxima[w]);
    return max;
}

// maxima (rows), sums (rows): the pieces of a log-sum-exp at the row's inverse temperature.
// Dynamic shared memory: 4 bytes for every 512 tokens, rounded up.
extern __shared__ float chunk_sums[];

extern "C" __global__ void __launch_bounds__(THREADS) sum_exp(
    const float* logits, const float* inverse_temperatures, float* maxima, double* sums, int vocab) {
    const float* row = logits + (u64)blockIdx.x * vocab;
    const int tid = threadIdx.x, lane = tid % LANES, chunks = (vocab + CHUNK - 1) / CHUNK;
    const float max = row_maximum(row, vocab), scale = inverse_temperatures[blockIdx.x];
    // All lanes of a warp take part in the tree, so both of its halves make as many rounds.
    for (int first = tid / WARP * 2; first < chunks; first += THREADS / LANES) {
        const int chunk = first + tid % WARP / LANES;
        float sum = 0.0f;
        const int end = min((chunk + 1) * CHUNK, vocab);
        for (int v = chunk * CHUNK; v < end; v += LANES)
            if (v + lane < end) {
                sum = __fadd_rn(sum, canon_exp(__fmul_rn(__fadd_rn(row[v + lane], -max), scale)));
            } else {
                // The twin's tail holds -infinity, which is NaN only where the maximum is no number.
                sum = __fadd_rn(sum, canon_exp(__fmul_rn(__fadd_rn(NEG_INFINITY, -max), scale)));
            }
        sum = lane_sum(sum);
        if (lane == 0 && chunk < chunks) chunk_sums[chunk] = sum;
    }
    SUMS_ARE_WRITTEN();
    if (tid != 0) return;
    double total = 0.0;
    for (int chunk = 0; chunk < chunks; ++chunk) total = __dadd_rn(total, (double)chunk_sums[chunk]);
    maxima[blockIdx.x] = max;
    sums[blockIdx.x] = total;
}

// Natural logarithm of a positive, finite, normal x; NaN for anything else but 0. As ops/math.rs.
__device__ __forceinline__ double canon_ln(double x) {
    const double ln2_hi = 6.931471803691238e-1, ln2_lo = 1.9082149292705877e-10;
    u64 bits = (u64)__double_as_longlong(x);
    if (x == 0.0) return __longlong_as_double((long long)0xfff0000000000000ULL);
    int exponent = (int)(bits >> 52 & 0x7ff);
    if (!(x > 0.0) || exponent == 0 || exponent == 0x7ff)
        return __longlong_as_double(0x7ff8000000000000LL);
    exponent -= 1023;
    double mantissa = __longlong_as_double((long long)((bits & 0x000fffffffffffffULL) | 1023ULL << 52));
    if (mantissa > 1.4142135623730951) {
        mantissa = __dmul_rn(mantissa, 0.5);
        ++exponent;
    }
    const double s = __ddiv_rn(__dadd_rn(mantissa, -1.0), __dadd_rn(mantissa, 1.0));
    const double s2 = __dmul_rn(s, s);
    double sum = 0.0;
    for (int k = 11; k >= 0; --k) sum = __fma_rn(s2, sum, __ddiv_rn(1.0, (double)(2 * k + 1)));
    const double n = (double)exponent;
    return __fma_rn(n, ln2_hi, __fma_rn(__dmul_rn(2.0, s), sum, __dmul_rn(n, ln2_lo)));
}

// e^x for |x| < 700, else 0 or infinity. As ops/math.rs.
__device__ __forceinline__ double canon_exp64(double x) {
    if (x != x || fabs(x) >= 700.0)
        return x < 0.0 ? 0.0 : __dadd_rn(x, __longlong_as_double(0x7ff0000000000000LL));
    const double n = rint(__dmul_rn(x, 1.4426950408889634));
    const double r = __fma_rn(n, -1.9082149292705877e-10, __fma_rn(n, -6.931471803691238e-1, x));
    double sum = 1.0;
    for (int k = 14; k >= 1; --k) sum = __fma_rn(__ddiv_rn(r, (double)k), sum, 1.0);
    return __dmul_rn(sum, __longlong_as_double((1023LL + (long long)n) << 52));
}

__device__ __forceinline__ u32 noise_word(u64 key, u32 position, u32 token) {
    u32 words[4] = {position, token / 4, 0, DOMAIN};
    philox(key, words);
    return token % 4 < 2 ? (token % 2 ? words[1] : words[0]) : (token % 2 ? words[3] : words[2]);
}

__device__ __forceinline__ double gumbel(u32 word) {
    const double u = __ddiv_rn(__dadd_rn((double)word, 0.5), 4294967296.0);
    return -canon_ln(-canon_ln(u));
}

// An upper bound on the noise of a word: 1 - u >= 2^-(ones + 1), and -ln u >= 1 - u.
__device__ __forceinline__ double noise_bound(u32 word) {
    return __dmul_rn((double)(__clz((int)~word) + 2), 0.6931471805599453);
}

// Finds how many of the keys with the given leading bytes have each next byte.
__device__ __forceinline__ void count_bytes(
    const float* row, int vocab, u64 prefix, int shift, u32* counts) {
    for (int i = threadIdx.x; i < 256; i += THREADS) counts[i] = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < vocab; v += THREADS) {
        const u64 key = key_of(row[v], v);
        const bool is_inside = shift == 56 || key >> (shift + 8) == prefix >> (shift + 8);
        if (is_inside) atomicAdd(&counts[key >> shift & 255], 1u);
    }
    __syncthreads();
}

// The k largest logits of each row with their ids, largest first, lower id first among equals; what
// is missing in a short row is UNKNOWN at -infinity.
extern "C" __global__ void __launch_bounds__(THREADS) largest(
    const float* logits, u32* top_ids, float* top_logits, int vocab, int k) {
    __shared__ u32 counts[256];
    __shared__ u64 keys[CANDIDATES_MAX];
    __shared__ u64 bound;
    __shared__ u32 missing, found;
    const float* row = logits + (u64)blockIdx.x * vocab;
    const int tid = threadIdx.x;
    if (tid == 0) {
        bound = 0;
        missing = min(k, vocab);
        found = 0;
    }
    keys[tid] = 0;
    __syncthreads();
    for (int shift = 56; shift >= 0 && k < vocab; shift -= 8) {
        const u64 prefix = bound;
        count_bytes(row, vocab, prefix, shift, counts);
        if (tid == 0) {
            int byte = 255;
            for (; counts[byte] < missing; --byte) missing -= counts[byte];
            bound = prefix | (u64)byte << shift;
        }
        __syncthreads();
    }
    for (int v = tid; v < vocab; v += THREADS) {
        const u64 key = key_of(row[v], v);
        if (key >= bound) keys[atomicAdd(&found, 1u)] = key;
    }
    __syncthreads();
    // Bitonic sort, descending.
    for (int size = 2; size <= CANDIDATES_MAX; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            const int other = tid ^ stride;
            const u64 mine = keys[tid], theirs = keys[other];
            const bool wants_larger = (tid < other) == ((tid & size) == 0);
            __syncthreads();
            keys[tid] = wants_larger == (mine > theirs) ? mine : theirs;
            __syncthreads();
        }
    if (tid < k) {
        const u64 at = (u64)blockIdx.x * k + tid;
        top_ids[at] = keys[tid] ? 0xffffffffu - (u32)keys[tid] : UNKNOWN;
        top_logits[at] = keys[tid] ? logit_of(keys[tid]) : NEG_INFINITY;
    }
}

struct Best {
    double value;
    u32 id;
};

__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// The best of all threads, in every thread.
__device__ __forceinline__ Best best_of_block(Best best) {
    __shared__ Best found[WARPS];
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        Best other = {__shfl_xor_sync(FULL, best.value, offset), __shfl_xor_sync(FULL, best.id, offset)};
        best = better(best, other);
    }
    __syncthreads();
    if (threadIdx.x % WARP == 0) found[threadIdx.x / WARP] = best;
    __syncthreads();
    best = found[0];
    for (int w = 1; w < WARPS; ++w) best = better(best, found[w]);
    return best;
}

// How a row's token is drawn. A temperature of 0 is greedy; top_k of 0 and top_p of 1 keep all.
struct Sampling {
    u64 key;
    u32 position;
    float temperature;
    int top_k;
    float top_p, min_p;
    int unused;
};

// How many of the `count` largest logits survive, -1 where they do not tell. Thread 0 knows.
__device__ __forceinline__ int survivors(
    const Sampling& s, const float* top, int count, bool is_complete, double row_sum, double* weights) {
    const float max = top[0];
    int kept = count;
    if (s.min_p > 0.0f) {
        int end = 0;
        while (end < kept && weights[end] >= (double)s.min_p) ++end;
        if (end == kept && !is_complete) return -1;
        kept = end > 1 ? end : 1;
    }
    if (s.top_p < 1.0f) {
        const bool is_whole = (is_complete && s.top_k > 0) || kept < count;
        double total = 0.0;
        // The row's sum at this temperature, 1 / exp(-ln sum), as the twin writes it.
        if (is_whole)
            for (int i = 0; i < kept; ++i) total = __dadd_rn(total, weights[i]);
        else
            total = __ddiv_rn(1.0, canon_exp64(__dadd_rn(
                __dmul_rn((double)__fadd_rn(max, -max), (double)__fdiv_rn(1.0f, s.temperature)),
                -canon_ln(row_sum))));
        const double wanted = __dmul_rn((double)s.top_p, total);
        double sum = 0.0;
        for (int i = 0; i < kept; ++i) {
            sum = __dadd_rn(sum, weights[i]);
            if (sum >= wanted) return i + 1;
        }
        return is_complete ? kept : -1;
    }
    return is_complete || s.min_p > 0.0f ? kept : -1;
}

// tokens (rows). top_ids and top_logits (rows, k), largest first, lower id first among equals, k at
// most 256; sums (rows) of sum_exp at the rows' temperatures.
extern "C" __global__ void __launch_bounds__(THREADS) draw(
    const float* logits, const Sampling* samplings, const u32* top_ids, const float* top_logits,
    const double* sums, u32* tokens, int vocab, int k) {
    __shared__ double weights[CANDIDATES_MAX];
    __shared__ int kept;
    const float* row = logits + (u64)blockIdx.x * vocab;
    const Sampling s = samplings[blockIdx.x];
    const int tid = threadIdx.x;
    const double lowest = __longlong_as_double((long long)0xfff0000000000000ULL);
    if (!(s.temperature >= 1e-5f)) {
        Best best = {lowest, UNKNOWN};
        for (int v = tid; v < vocab; v += THREADS) best = better(best, Best{(double)row[v], (u32)v});
        best = best_of_block(best);
        if (tid == 0) tokens[blockIdx.x] = best.id;
        return;
    }
    const double inverse = __ddiv_rn(1.0, (double)s.temperature);
    const bool is_limited = s.top_k > 0 && s.top_k < vocab;
    if (!is_limited && s.top_p >= 1.0f && !(s.min_p > 0.0f)) {
        Best best = {lowest, UNKNOWN};
        for (int v = tid; v < vocab; v += THREADS) best = better(best, Best{(double)row[v], (u32)v});
        // The largest logit sets a bar that most tokens cannot reach even with the best noise.
        best = best_of_block(best);
        const double bar = __dadd_rn(__dmul_rn(best.value, inverse),
                                     gumbel(noise_word(s.key, s.position, best.id)));
        best.value = bar;
        for (int group = tid; group * 4 < vocab; group += THREADS) {
            u32 words[4] = {s.position, (u32)group, 0, DOMAIN};
            philox(s.key, words);
            for (int i = 0; i < 4 && group * 4 + i < vocab; ++i) {
                const double value = __dmul_rn((double)row[group * 4 + i], inverse);
                if (__dadd_rn(value, noise_bound(words[i])) < best.value) continue;
                const Best here = {__dadd_rn(value, gumbel(words[i])), (u32)(group * 4 + i)};
                best = better(best, here);
            }
        }
        best = best_of_block(best);
        if (tid == 0) tokens[blockIdx.x] = best.id;
        return;
    }
    const u32* ids = top_ids + (u64)blockIdx.x * k;
    const float* top = top_logits + (u64)blockIdx.x * k;
    const int limit = is_limited ? s.top_k : vocab, count = min(k, limit);
    if (tid < count)
        weights[tid] = canon_exp64(
            __ddiv_rn((double)__fadd_rn(top[tid], -top[0]), (double)s.temperature));
    __syncthreads();
    if (tid == 0)
        kept = count > 0 ? survivors(s, top, count, count == limit, sums[blockIdx.x], weights) : -1;
    __syncthreads();
    Best best = {lowest, UNKNOWN};
    if (tid < kept) {
        const double noise = gumbel(noise_word(s.key, s.position, ids[tid]));
        best = Best{__dadd_rn(__dmul_rn((double)top[tid], inverse), noise), ids[tid]};
    }
    best = best_of_block(best);
    if (tid == 0) tokens[blockIdx.x] = best.id;
}

// A token of a row: UNKNOWN is the one that was drawn from it.
struct Query {
    u32 row, token;
};

// The logit of each query's token and 1 + how many tokens of the row have a larger one; a rank of 0
// where nothing was drawn. grid (queries), block 256.
extern "C" __global__ void __launch_bounds__(THREADS) look_up(
    const float* logits, const Query* queries, const u32* tokens, float* found, u32* ranks, int vocab) {
    __shared__ u32 counts[WARPS];
    const Query query = queries[blockIdx.x];
    const float* row = logits + (u64)query.row * vocab;
    const u32 token = query.token == UNKNOWN ? tokens[query.row] : query.token;
    const int tid = threadIdx.x;
    u32 larger_ones = 0;
    const float logit = token == UNKNOWN ? 0.0f : row[token];
    for (int v = tid; v < vocab; v += THREADS) larger_ones += row[v] > logit;
    larger_ones = warp_sum(larger_ones);
    if (tid % WARP == 0) counts[tid / WARP] = larger_ones;
    SUMS_ARE_WRITTEN();
    if (tid != 0) return;
    u32 rank = 1;
    for (int w = 0; w < WARPS; ++w) rank += counts[w];
    found[blockIdx.x] = logit;
    ranks[blockIdx.x] = token == UNKNOWN ? 0 : rank;
}
