// Runs the kernels against plain loops: built with -fsanitize=address and -fsanitize=thread by
// tests/engine/kernels.rs, which turns out-of-bounds accesses and races into failures.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

typedef int Launch(const unsigned*, const unsigned*, size_t, uint64_t, void**, char*, size_t);
extern "C" Launch emu_sketch_rows, emu_reduce_logits;

template <class... A>
static bool run(Launch* launch, unsigned rows, unsigned threads, size_t smem, uint64_t seed, A... a) {
    unsigned grid[3] = {rows, 1, 1}, block[3] = {threads, 1, 1};
    void* parameters[] = {(void*)&a...};
    char error[400] = "";
    if (launch(grid, block, smem, seed, parameters, error, sizeof error) == 0) return true;
    printf("%s\n", error);
    return false;
}

static uint32_t state = 1;
static uint32_t noise() { return (state = state * 1664525u + 1013904223u) >> 8; }

struct Entry { uint64_t sketch_key, exact_key; uint32_t position; int slot; };
struct Result { float max, sum, target_logit; uint32_t target_rank, stop_rank; };

static bool check_sketch(int channels, int projections, uint64_t seed) {
    const int rows = 3;
    std::vector<uint16_t> data(rows * channels);
    for (auto& x : data) x = 0x3f00 + noise() % 512;
    std::vector<signed char> exponents(channels, 1);
    std::vector<short> means(channels, 3);
    std::vector<Entry> table(rows);
    for (int r = 0; r < rows; ++r) table[r] = {77, 88, (uint32_t)r, r == 1 ? -1 : r};
    std::vector<uint32_t> sketches(rows, 7);
    std::vector<uint64_t> first(rows, 7), hashes(rows, 7);
    auto go = [&](std::vector<uint64_t>& out, uint64_t order) {
        return run(emu_sketch_rows, rows, 128, 0, order, (const uint16_t*)data.data(),
                   (const signed char*)exponents.data(), (const short*)means.data(),
                   (const Entry*)table.data(), sketches.data(), out.data(), channels, 4, projections, 0);
    };
    if (!go(first, 0) || !go(hashes, seed)) return false;
    return hashes == first && hashes[1] == 7 && sketches[1] == 7 && hashes[0] != hashes[2];
}

static bool check_logits(int vocab, int k, uint64_t seed) {
    const int rows = 2;
    std::vector<float> logits(rows * vocab);
    for (auto& x : logits) x = noise() % 1000 * 0.01f;
    std::vector<int> targets = {vocab / 2, -1}, stops = {0, vocab - 1};
    std::vector<Result> results(rows);
    std::vector<uint32_t> ids(rows * k + 1);
    std::vector<float> top(rows * k + 1);
    if (!run(emu_reduce_logits, rows, 256, 256 * k * 8, seed, (const float*)logits.data(),
             (const int*)targets.data(), (const int*)stops.data(), results.data(), ids.data(),
             top.data(), vocab, 2, k, 1.0f))
        return false;
    for (int r = 0; r < rows; ++r) {
        const float* row = logits.data() + r * vocab;
        double sum = 0;
        float max = row[0];
        for (int v = 0; v < vocab; ++v) max = fmaxf(max, row[v]);
        for (int v = 0; v < vocab; ++v) sum += exp((double)row[v] - max);
        if (results[r].max != max || !(fabs(results[r].sum / sum - 1) < 1e-5)) return false;
        for (int i = 0; i < k && i < vocab; ++i) {
            uint32_t better = 0;
            for (int v = 0; v < vocab; ++v)
                better += row[v] > row[ids[r * k + i]] ||
                          (row[v] == row[ids[r * k + i]] && v < (int)ids[r * k + i]);
            if ((int)better != i) return false;
        }
    }
    return true;
}

int main() {
    int failed = 0;
    // Thread orders: forward, backward, shuffled.
    for (uint64_t seed : {0, 1, 5})
        for (int size : {1, 31, 96, 577}) {
            for (int projections : {4, 8})
                if (!check_sketch(size, projections, seed))
                    printf("sketch_rows %d %d seed %d\n", size, projections, (int)seed), ++failed;
            for (int k : {0, 5})
                if (!check_logits(size, k, seed))
                    printf("reduce_logits %d %d seed %d\n", size, k, (int)seed), ++failed;
        }
    printf("%d failed\n", failed);
    return failed != 0;
}
