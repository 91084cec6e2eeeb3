// Runs every kernel on small odd shapes: built with -fsanitize=address and -fsanitize=thread by
// tests/engine/kernels, which turns out-of-bounds accesses and races into failures. Proofs and
// reductions are held against plain loops here; the kernels of the forward pass must give the same
// bits in every order of threads (what bits these are is the Rust tests' business).
#include <cmath>
#include <cstdint>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

typedef int Launch(const unsigned*, const unsigned*, size_t, uint64_t, void**, char*, size_t);
extern "C" Launch emu_sketch_rows, emu_reduce_logits, emu_embed, emu_add_norm, emu_norm_add, emu_gate,
    emu_softcap, emu_pack, emu_decode_bf16_1, emu_decode_bf16_4, emu_decode_f16_8, emu_prefill_bf16,
    emu_prefill_f16, emu_qkv_finish, emu_attend_bf16_1, emu_attend_bf16_4, emu_attend_f16_8,
    emu_attend_merge, emu_sum_exp, emu_largest, emu_draw, emu_look_up, emu_route, emu_combine, emu_expert_bf16,
    emu_expert_f16, emu_decode_mma_bf16_8, emu_decode_mma_f16_32, emu_prefill_mma_bf16,
    emu_prefill_mma_f16, emu_expert_mma_bf16, emu_attend_mma_bf16_8, emu_attend_mma_f16_32, emu_group_slots,
    emu_grouped_bf16_8, emu_grouped_f16_64, emu_grouped_mma_bf16_32, emu_grouped_mma_f16_128,
    emu_read_ceiling, emu_fma_ceiling, emu_mma_ceiling_bf16, emu_mma_ceiling_f16;

struct Grid {
    unsigned x, y, z;
    Grid(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

template <class... A>
static bool run(Launch* launch, Grid size, unsigned threads, size_t smem, uint64_t seed, A... a) {
    unsigned grid[3] = {size.x, size.y, size.z}, block[3] = {threads, 1, 1};
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

template <class T>
static std::vector<T> filled(size_t n, T (*make)()) {
    std::vector<T> values(n);
    for (auto& x : values) x = make();
    return values;
}
static uint16_t bits16() { return 0x3c00 + noise() % 1024; }  // about 1 in bf16 and in f16
static float value() { return (float)(noise() % 2001) * 0.001f - 1.0f; }

// Runs `go` in three orders; `out` must come out the same.
template <class T, class F>
static bool same_in_every_order(const char* name, std::vector<T>& out, F go) {
    std::vector<T> first, begun = out;
    for (uint64_t seed : {0, 1, 5}) {
        out = begun;
        if (!go(seed)) return printf("%s seed %d\n", name, (int)seed), false;
        if (seed == 0) first = out;
        if (memcmp(first.data(), out.data(), out.size() * sizeof(T)) != 0)
            return printf("%s depends on the order of threads\n", name), false;
    }
    return true;
}

static int check_rows(int cols) {
    const int rows = 3;
    auto table = filled(40 * ((cols + 31) / 32 * 32), bits16);
    std::vector<uint32_t> ids = {39, 0, 31};
    std::vector<float> x(rows * cols), branch = filled(rows * cols, value), weight = filled(cols, value);
    auto gates = filled(rows * 2 * (cols + 3), value);
    std::vector<uint16_t> out(rows * cols), packed((rows + 31) / 32 * 32 * ((cols + 31) / 32) * 32);
    int failed = 0;
    failed += !same_in_every_order("embed", x, [&](uint64_t seed) {
        return run(emu_embed, rows, 256, 0, seed, table.data(), ids.data(), x.data(), cols, 0, 2.0f, 0);
    });
    x = filled(rows * cols, value);
    failed += !same_in_every_order("add_norm", x, [&](uint64_t seed) {
        return run(emu_add_norm, rows, 256, 4 * cols, seed, x.data(), branch.data(), weight.data(),
                   weight.data(), (uint32_t*)nullptr, out.data(), cols, 1e-5f, 0);
    });
    failed += !same_in_every_order("norm_add", x, [&](uint64_t seed) {
        return run(emu_norm_add, rows, 256, 4 * cols, seed, x.data(), branch.data(), (float*)nullptr,
                   weight.data(), cols, 1e-5f);
    });
    failed += !same_in_every_order("gate", out, [&](uint64_t seed) {
        return run(emu_gate, Grid((cols + 255) / 256, rows), 256, 0, seed, gates.data(), out.data(),
                   cols, cols + 3, 1, 1);
    });
    failed += !same_in_every_order("softcap", x, [&](uint64_t seed) {
        return run(emu_softcap, (rows * cols + 255) / 256, 256, 0, seed, x.data(),
                   (uint64_t)(rows * cols), 30.0f);
    });
    failed += !same_in_every_order("pack", packed, [&](uint64_t seed) {
        return run(emu_pack, rows, 256, 0, seed, table.data(), packed.data(), cols, 0, 0);
    });
    return failed;
}

static int check_products(int tokens, int rows, int cols) {
    auto w = filled((rows + 31) / 32 * 32 * ((cols + 31) / 32) * 32, bits16);
    auto x = filled(tokens * cols, bits16);
    std::vector<float> out(tokens * rows);
    struct Variant { const char* name; Launch* launch; int rows, tokens, threads; } variants[] = {
        {"decode_bf16_1", emu_decode_bf16_1, 32, 1, 256}, {"decode_bf16_4", emu_decode_bf16_4, 32, 4, 256},
        {"decode_f16_8", emu_decode_f16_8, 32, 8, 256}, {"prefill_bf16", emu_prefill_bf16, 64, 64, 128},
        {"prefill_f16", emu_prefill_f16, 64, 64, 128}, {"decode_mma_bf16_8", emu_decode_mma_bf16_8, 32, 8, 256},
        {"decode_mma_f16_32", emu_decode_mma_f16_32, 32, 32, 256},
        {"prefill_mma_bf16", emu_prefill_mma_bf16, 64, 128, 128},
        {"prefill_mma_f16", emu_prefill_mma_f16, 64, 128, 128}};
    int failed = 0;
    for (auto& v : variants) {
        if (v.tokens == 128 && cols % 8 != 0) continue;  // rows of inputs that 16-byte copies cannot read
        failed += !same_in_every_order(v.name, out, [&](uint64_t seed) {
            Grid grid((tokens + v.tokens - 1) / v.tokens, (rows + v.rows - 1) / v.rows);
            return run(v.launch, grid, v.threads, 0, seed, w.data(), x.data(), out.data(), rows, cols, tokens);
        });
    }
    return failed;
}

struct Shape { int heads, kv_heads, head_dim, window; float scale, cap; };
struct Tile { int row_zero, start, first_query, queries, table, unused; };

static int check_attention(int head_dim, int start) {
    const int rows = 2, heads = 4, kv_heads = 2, tiles = (head_dim + 31) / 32;
    const int blocks = (start + rows + 31) / 32, partitions = (start + rows - 1) / 512 + 1;
    const int row_len = (heads + 2 * kv_heads) * head_dim;
    auto qkv = filled(rows * row_len, value), norm = filled(head_dim, value);
    auto angles = filled(rows * head_dim / 2, value);
    auto queries = filled(rows * heads * head_dim, bits16);
    auto keys = filled(blocks * kv_heads * tiles * 1024, bits16);
    auto values = filled(blocks * kv_heads * 32 * head_dim, bits16);
    std::vector<uint32_t> table(blocks), slots, positions;
    for (int i = 0; i < blocks; ++i) table[i] = blocks - 1 - i;
    std::vector<Tile> all;
    for (int r = 0; r < rows; ++r) {
        positions.push_back(start + r);
        slots.push_back(table[(start + r) / 32] * 32 + (start + r) % 32);
    }
    int failed = !same_in_every_order("qkv_finish", keys, [&](uint64_t seed) {
        return run(emu_qkv_finish, Grid(rows, heads + 2 * kv_heads), 128, 0, seed, qkv.data(),
                   (float*)nullptr, norm.data(), norm.data(), angles.data(), angles.data(), slots.data(),
                   queries.data(), keys.data(), values.data(), heads, kv_heads, head_dim, 1e-5f, 0, 0);
    });
    auto packed_values = filled(keys.size(), bits16);
    failed += !same_in_every_order("qkv_finish packs_values", packed_values, [&](uint64_t seed) {
        return run(emu_qkv_finish, Grid(rows, heads + 2 * kv_heads), 128, 0, seed, qkv.data(),
                   (float*)nullptr, norm.data(), norm.data(), angles.data(), angles.data(), slots.data(),
                   queries.data(), keys.data(), packed_values.data(), heads, kv_heads, head_dim, 1e-5f, 0, 1);
    });
    std::vector<float> parts(rows * heads * partitions * (head_dim + 2));
    std::vector<uint16_t> out(rows * heads * head_dim);
    Shape shape = {heads, kv_heads, head_dim, 0, 0.1f, 0.0f};
    struct Variant { const char* name; Launch* launch; int size, split; } variants[] = {
        {"attend_bf16_1", emu_attend_bf16_1, 1, 0}, {"attend_bf16_4", emu_attend_bf16_4, 4, 1},
        {"attend_f16_8", emu_attend_f16_8, 8, 0}, {"attend_mma_bf16_8", emu_attend_mma_bf16_8, 8, 1},
        {"attend_mma_f16_32", emu_attend_mma_f16_32, 32, 0}};
    for (auto& v : variants) {
        all.clear();
        for (int q = 0; q < rows * heads / kv_heads; q += v.size)
            all.push_back({0, start, q, std::min(v.size, rows * heads / kv_heads - q), 0, 0});
        failed += !same_in_every_order(v.name, out, [&](uint64_t seed) {
            const bool is_mma = strstr(v.name, "mma");
            const int warps = is_mma ? 16 : v.size == 8 ? 4 : 8;
            size_t memory = is_mma ? 16 * v.size * (4 * (tiles | 1) + 68)
                                   : 4 * v.size * (512 + tiles * 32 + warps * head_dim);
            Grid grid(all.size(), kv_heads, v.split ? partitions : 1);
            if (!run(v.launch, grid, 32 * warps, memory, seed, queries.data(), keys.data(),
                     is_mma ? packed_values.data() : values.data(),
                     table.data(), all.data(), parts.data(), out.data(), shape, partitions, v.split))
                return false;
            return !v.split || run(emu_attend_merge, Grid(rows, heads), 128, 0, seed, parts.data(),
                                   positions.data(), out.data(), shape, partitions, 0);
        });
    }
    return failed;
}

struct Sampling { uint64_t key; uint32_t position; float temperature; int top_k; float top_p, min_p; int unused; };

static int check_draw(int vocab) {
    const int rows = 3, k = 256;
    auto logits = filled(rows * vocab, value), maxima = filled(rows, value), top = filled(rows * k, value);
    std::vector<float> inverse(rows, 1.25f);
    std::vector<double> sums(rows);
    std::vector<uint32_t> ids(rows * k), tokens(rows);
    std::vector<Sampling> rules = {{7, 1, 0.8f, 0, 1, 0, 0}, {8, 2, 0, 0, 1, 0, 0}, {9, 3, 0.8f, 40, 0.9f, 0, 0}};
    int failed = !same_in_every_order("sum_exp", sums, [&](uint64_t seed) {
        return run(emu_sum_exp, rows, 256, (vocab + 511) / 512 * 4, seed, logits.data(), inverse.data(),
                   maxima.data(), sums.data(), vocab);
    });
    failed += !same_in_every_order("largest", ids, [&](uint64_t seed) {
        return run(emu_largest, rows, 256, 0, seed, logits.data(), ids.data(), top.data(), vocab, k);
    });
    failed += !same_in_every_order("draw", tokens, [&](uint64_t seed) {
        return run(emu_draw, rows, 256, 0, seed, logits.data(), rules.data(), ids.data(), top.data(),
                   sums.data(), tokens.data(), vocab, k);
    });
    std::vector<uint32_t> queries = {0, 0xffffffffu, 1, 0, 2, (uint32_t)vocab - 1}, ranks(3);
    std::vector<float> found(3);
    failed += !same_in_every_order("look_up", ranks, [&](uint64_t seed) {
        return run(emu_look_up, 3, 256, 0, seed, logits.data(), queries.data(), tokens.data(), found.data(),
                   ranks.data(), vocab);
    });
    return failed;
}

static int check_experts(int tokens, int cols) {
    const int experts = 6, used = 2, rows = 37, tiles = (cols + 31) / 32 * 2;
    auto scores = filled(tokens * experts, value), weights = filled(tokens * used, value);
    auto w = filled(experts * tiles * 1024, bits16), x = filled(tokens * cols, bits16);
    std::vector<uint32_t> chosen(tokens * used);
    std::vector<float> y(tokens * used * rows), out(tokens * rows);
    int failed = !same_in_every_order("route", chosen, [&](uint64_t seed) {
        return run(emu_route, tokens, 32, 0, seed, scores.data(), chosen.data(), weights.data(), experts,
                   used, 1);
    });
    for (Launch* product : {emu_expert_bf16, emu_expert_f16, emu_expert_mma_bf16})
        failed += !same_in_every_order("expert", y, [&](uint64_t seed) {
            return run(product, Grid((rows + 31) / 32, tokens * used), 256, 0, seed, w.data(),
                       chosen.data(), x.data(), y.data(), rows, cols, used, 1);
        });
    struct Variant { const char* name; Launch* launch; int size; } variants[] = {
        {"grouped_bf16_8", emu_grouped_bf16_8, 8}, {"grouped_f16_64", emu_grouped_f16_64, 64},
        {"grouped_mma_bf16_32", emu_grouped_mma_bf16_32, 32},
        {"grouped_mma_f16_128", emu_grouped_mma_f16_128, 128}};
    for (auto& v : variants) {
        if (v.size == 128 && cols % 8 != 0) continue;
        const int slots = tokens * used, count = slots / v.size + std::min(experts, slots);
        std::vector<uint32_t> grouped(slots), table(4 * count);
        failed += !same_in_every_order(v.name, y, [&](uint64_t seed) {
            const Grid grid(count, v.size >= 64 ? (rows + 63) / 64 : (rows + 31) / 32);
            return run(emu_group_slots, 1, 256, 0, seed, chosen.data(), grouped.data(), table.data(), slots,
                       v.size, count) &&
                   run(v.launch, grid, v.size >= 64 ? 128 : 256, 0, seed, w.data(), x.data(), y.data(),
                       grouped.data(), table.data(), rows, cols, used);
        });
    }
    failed += !same_in_every_order("combine", out, [&](uint64_t seed) {
        return run(emu_combine, tokens, 256, 0, seed, y.data(), weights.data(), out.data(), rows, used);
    });
    return failed;
}

static int check_ceilings(int groups) {
    const int blocks = 2, threads = 256 * blocks;
    auto data = filled(8 * groups, bits16);
    std::vector<uint32_t> words(threads);
    std::vector<float> sums(threads);
    int failed = !same_in_every_order("read_ceiling", words, [&](uint64_t seed) {
        return run(emu_read_ceiling, blocks, 256, 0, seed, data.data(), words.data(), (uint64_t)groups);
    });
    failed += !same_in_every_order("fma_ceiling", sums, [&](uint64_t seed) {
        return run(emu_fma_ceiling, blocks, 256, 0, seed, sums.data(), 0.5f, 1.0f, 3);
    });
    for (Launch* launch : {emu_mma_ceiling_bf16, emu_mma_ceiling_f16}) {
        failed += !same_in_every_order("mma_ceiling", sums, [&](uint64_t seed) {
            return run(launch, blocks, 256, 0, seed, sums.data(), 3);
        });
        for (float sum : sums) failed += sum != 48.0f;
    }
    return failed;
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
    failed += check_rows(1) + check_rows(97);
    failed += check_products(1, 5, 34) + check_products(9, 65, 330) + check_products(3, 33, 1032);
    failed += check_attention(16, 30) + check_attention(80, 511);
    failed += check_draw(5) + check_draw(1030);
    failed += check_experts(2, 34) + check_experts(5, 96);
    failed += check_ceilings(1) + check_ceilings(5000);
    printf("%d failed\n", failed);
    return failed != 0;
}
