/* Final-norm rows and logits of llama.cpp, for scripts/other_stack.py:
 *     llama_rows MODEL THREADS CACHE
 * CACHE is the type of keys and values: f16 (llama.cpp's own choice), bf16 or f32. Reads requests from
 * standard input: the position of the first token (0 forgets all that came before), the number of tokens,
 * how many of them are computed at once (the others follow one by one, as a miner decodes), whether
 * logits are wanted (0 or 1), and the ids, each a little-endian u32. Writes the rows of every token as f32,
 * (tokens, channels), and where they are wanted the last one's logits, (vocabulary). Built against
 * llama.cpp 11434 by other_engines.py. */
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

static void put(const float *values, int count) {
    if (!values) fail("llama.cpp has no such values");
    if (fwrite(values, sizeof *values, (size_t)count, stdout) != (size_t)count) fail("cannot write");
}

/* Computes `count` tokens from position `first` on and writes their rows. */
static void compute(struct llama_context *context, struct llama_batch *batch, const uint32_t *ids,
                    uint32_t first, uint32_t count, int channels) {
    batch->n_tokens = (int32_t)count;
    for (uint32_t i = 0; i < count; i++) {
        batch->token[i] = (llama_token)ids[i];
        batch->pos[i] = (llama_pos)(first + i);
        batch->n_seq_id[i] = 1;
        batch->seq_id[i][0] = 0;
        batch->logits[i] = 1;
    }
    if (llama_decode(context, *batch)) fail("llama_decode failed");
    for (uint32_t i = 0; i < count; i++)
        put(llama_get_embeddings_ith(context, (int32_t)i), channels);
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
    uint32_t head[4], position = 0;
    int channels = llama_model_n_embd(model);
    int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    while (fread(head, sizeof *head, 4, stdin) == 4) {
        uint32_t first = head[0], tokens = head[1], at_once = head[2];
        if (first && first != position) fail("the first token does not follow the last one");
        if (!tokens || tokens > CONTEXT - first || !at_once || at_once > tokens)
            fail("a wrong number of tokens");
        if (fread(ids, sizeof *ids, tokens, stdin) != tokens) fail("the ids end early");
        if (!first) llama_memory_clear(llama_get_memory(context), true);
        compute(context, &batch, ids, first, at_once, channels);
        for (uint32_t i = at_once; i < tokens; i++)
            compute(context, &batch, ids + i, first + i, 1, channels);
        if (head[3]) put(llama_get_logits_ith(context, -1), vocabulary);
        fflush(stdout);
        position = first + tokens;
    }
    return 0;
}
