/* Final-norm rows of llama.cpp, for scripts/other_stack.py:
 *     llama_rows MODEL THREADS CACHE
 * CACHE is the type of keys and values: f16 (llama.cpp's own choice), bf16 or f32. Reads requests from
 * standard input: the number of tokens, how many of them are computed at once (the others follow one by
 * one, as a miner decodes), and the ids, each a little-endian u32. Writes the rows of every token as f32:
 * (tokens, channels). Built against llama.cpp 11434 by other_stack.py. */
#include <llama.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 4096 };

static void fail(const char *why) {
    fprintf(stderr, "llama_rows: %s\n", why);
    exit(1);
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static enum ggml_type cache_type(const char *name) {
    if (!strcmp(name, "f16")) return GGML_TYPE_F16;
    if (!strcmp(name, "bf16")) return GGML_TYPE_BF16;
    if (!strcmp(name, "f32")) return GGML_TYPE_F32;
    fail("CACHE must be f16, bf16 or f32");
    return GGML_TYPE_F32;
}

/* Computes `count` tokens from position `first` on and writes their rows. */
static void compute(struct llama_context *context, struct llama_batch *batch, const uint32_t *ids,
                    uint32_t first, uint32_t count, int channels) {
    batch->n_tokens = (int32_t)count;
    for (uint32_t i = 0; i < count; i++) {
        batch->token[i] = (llama_token)ids[first + i];
        batch->pos[i] = (llama_pos)(first + i);
        batch->n_seq_id[i] = 1;
        batch->seq_id[i][0] = 0;
        batch->logits[i] = 1;
    }
    if (llama_decode(context, *batch)) fail("llama_decode failed");
    for (uint32_t i = 0; i < count; i++) {
        const float *row = llama_get_embeddings_ith(context, (int32_t)i);
        if (!row) fail("there is no row");
        if (fwrite(row, sizeof *row, (size_t)channels, stdout) != (size_t)channels) fail("cannot write");
    }
}

int main(int count, char **words) {
    if (count != 4) fail("usage: llama_rows MODEL THREADS CACHE");
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model_params of_model = llama_model_default_params();
    of_model.n_gpu_layers = 0;
    struct llama_model *model = llama_model_load_from_file(words[1], of_model);
    if (!model) fail("the model cannot be loaded");
    struct llama_context_params wanted = llama_context_default_params();
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = CONTEXT;
    wanted.n_threads = wanted.n_threads_batch = atoi(words[2]);
    wanted.pooling_type = LLAMA_POOLING_TYPE_NONE;
    wanted.embeddings = true;
    wanted.type_k = wanted.type_v = cache_type(words[3]);
    struct llama_context *context = llama_init_from_model(model, wanted);
    if (!context) fail("there is no context");
    struct llama_batch batch = llama_batch_init(CONTEXT, 0, 1);
    static uint32_t ids[CONTEXT];
    uint32_t head[2];
    while (fread(head, sizeof *head, 2, stdin) == 2) {
        uint32_t tokens = head[0], at_once = head[1];
        if (!tokens || tokens > CONTEXT || !at_once || at_once > tokens) fail("a wrong number of tokens");
        if (fread(ids, sizeof *ids, tokens, stdin) != tokens) fail("the ids end early");
        llama_memory_clear(llama_get_memory(context), true);
        compute(context, &batch, ids, 0, at_once, llama_model_n_embd(model));
        for (uint32_t i = at_once; i < tokens; i++)
            compute(context, &batch, ids, i, 1, llama_model_n_embd(model));
        fflush(stdout);
    }
    return 0;
}
