#!/usr/bin/env python3
"""Another stack behind OpenAI's /v1/completions, for `scripts/audit-peers`: whole answers with token ids
and log-probabilities of the untruncated distribution at temperature 0 or 1, one at a time.

    peer_server.py llama MODEL.gguf           ik_llama.cpp (a fork of llama.cpp), weights of any type
    peer_server.py transformers MODEL.gguf    Hugging Face transformers, weights in bf16

Prints its address. Needs numpy, and ik-llama-cpp-python, or what `other_stack.py` needs.
"""

import http.server
import json
import sys

import numpy as np

CONTEXT, THREADS = 2048, 1


class Llama:
    """ik_llama.cpp with its defaults: a cache in f16, activations of quantised products in 8 bits."""

    def __init__(self, path):
        from ik_llama_cpp import _internals as internals
        self.internals = internals
        self.model = internals.IkModel(path)
        self.context = internals.IkContext(self.model, n_ctx=CONTEXT, n_threads=THREADS,
                                           flash_attn=False)
        self.size, self.at = self.model.n_vocab, 0

    def tokens(self, text):
        return self.model.tokenize(text, add_bos=True, special=True)

    def text(self, ids):
        return self.model.detokenize(ids, special=False)

    def is_end(self, token):
        return self.internals.C.llama_token_is_eog(self.model.model, token)

    def begin(self):
        self.context.kv_cache_clear()
        self.at = 0

    def row(self, ids):
        """Logits after these tokens, which follow those of the calls before."""
        batch = self.internals.make_batch_range(ids, pos_start=self.at)
        code = self.context.decode(batch)
        self.internals.C.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode gives code {code}")
        self.at += len(ids)
        row = self.context.get_logits(-1)
        return np.ctypeslib.as_array(row, (self.size,)).astype(np.float64)


class Transformers:
    """The model's module with weights, activations and cache in bf16."""

    def __init__(self, path):
        import os
        import torch
        from other_stack import File
        from transformers import AutoTokenizer, LlamaForCausalLM
        torch.set_num_threads(THREADS)
        self.torch, self.file = torch, File(path)
        self.tokenizer = AutoTokenizer.from_pretrained(
            os.path.dirname(os.path.abspath(path)), gguf_file=os.path.basename(path))
        self.model = LlamaForCausalLM._from_config(self.file.config(), dtype=torch.bfloat16).eval()
        self.model.load_state_dict(self.file.state())
        self.cache = None

    def tokens(self, text):
        return self.tokenizer(text)["input_ids"]

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def is_end(self, token):
        return token in self.file.end_ids

    def begin(self):
        self.cache = None

    def row(self, ids):
        with self.torch.no_grad():
            out = self.model(self.torch.tensor([ids]), cache=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[0, -1].float().numpy().astype(np.float64)


def answer(stack, asked):
    rng = np.random.default_rng(asked.get("seed", 0))
    prompt, best_of = stack.tokens(asked["prompt"]), asked["logprobs"]
    stack.begin()
    row, ids, sent, tops, finish = stack.row(prompt), [], [], [], "length"
    while len(ids) < asked["max_tokens"]:
        logprobs = row - row.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        chances = np.exp(logprobs)
        if asked.get("temperature", 1) == 0:
            token = int(row.argmax())
        else:
            token = int(rng.choice(len(row), p=chances / chances.sum()))
        ids.append(token)
        sent.append(float(logprobs[token]))
        best = np.argpartition(-row, best_of)[:best_of]
        tops.append({f"token_id:{i}": float(logprobs[i]) for i in best})
        if stack.is_end(token):
            finish = "stop"
            break
        row = stack.row([token])
    choice = {
        "index": 0, "text": stack.text(ids), "finish_reason": finish, "token_ids": ids,
        "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": sent,
                     "top_logprobs": tops},
    }
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
    return {"object": "text_completion", "model": asked["model"], "choices": [choice], "usage": usage}


def serve(stack):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                code, body = 200, answer(stack, asked)
            except (ValueError, KeyError, TypeError) as e:
                code, body = 400, {"error": {"message": f"{type(e).__name__}: {e}"}}
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


STACKS = {"llama": Llama, "transformers": Transformers}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in STACKS:
        sys.exit(__doc__)
    serve(STACKS[sys.argv[1]](sys.argv[2]))
