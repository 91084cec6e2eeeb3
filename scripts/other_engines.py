"""Engines beside transformers, for other_stack.py: llama.cpp and vLLM on the CPU.

Both have `rows(tokens, at_once)`, the rows after the last norm for ids that are there, and
`generate(requests, reason, end_ids)`, which draws each request's output from the engine's own
logits and returns the rows that it was drawn from: (tokens, channels) for each.
"""

import os
import pathlib
import struct
import subprocess

import numpy as np
import torch


class Llama:
    """llama.cpp, as the program llama_rows."""

    def __init__(self, args, cache, file):
        own = pathlib.Path(__file__).with_name("llama_rows.c")
        home = next((cache / "peers").glob("llama.cpp-*"), None)
        build = next(home.glob("build-*/bin/libllama.so"), None) if home else None
        assert build, "there is no llama.cpp: run scripts/bench-peers --peers llama first"
        program, source = build.with_name("llama_rows"), home / "llama.cpp"
        subprocess.run(
            ["cc", "-O2", "-o", program, own, f"-I{source}/include", f"-I{source}/ggml/include",
             f"-L{build.parent}", "-lllama", f"-Wl,-rpath,{build.parent}"], check=True)
        self.process = subprocess.Popen(
            [program, args.llama, str(args.threads), args.llama_cache],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.channels = file.own("embedding_length")
        self.vocabulary = len(file.get("tokenizer.ggml.tokens"))

    def rows(self, tokens, at_once):
        self.compute(0, tokens, at_once, False)
        return torch.from_numpy(self.read(len(tokens), self.channels))

    def generate(self, requests, reason, _end_ids):
        return [self.answer(request, reason) for request in requests]

    def answer(self, request, reason):
        tokens, first, rows = request.prompt, 0, []
        while True:
            self.compute(first, tokens, len(tokens), True)
            rows.append(self.read(len(tokens), self.channels)[-1])
            logits = self.read(1, self.vocabulary)[0].astype(np.float64)
            first += len(tokens)
            tokens = [request.draw(logits, first - 1)]
            request.output += tokens
            if reason(request):
                return torch.from_numpy(np.stack(rows))

    def compute(self, first, tokens, at_once, has_logits):
        head = struct.pack("<4I", first, len(tokens), at_once, has_logits)
        self.process.stdin.write(head + struct.pack(f"<{len(tokens)}I", *tokens))
        self.process.stdin.flush()

    def read(self, rows, columns):
        wanted = 4 * rows * columns
        data = self.process.stdout.read(wanted)
        assert len(data) == wanted, "llama_rows ended"
        return np.frombuffer(data, np.float32).reshape(rows, columns).copy()


class Vllm:
    """vLLM: what it pools of every token is the row after the last norm."""

    def __init__(self, args):
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{args.threads - 1}"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.config import PoolerConfig

        pooler = PoolerConfig(task="token_embed", tok_pooling_type="ALL", use_activation=False)
        self.pooling = load(args, runner="pooling", convert="embed", pooler_config=pooler)
        self.drawing = None
        if not args.prefill_only:
            # Output ids must be known before the next draw.
            self.drawing = load(args, logits_processors=[noise_processor()],
                                async_scheduling=False)

    def rows(self, tokens, at_once):
        assert at_once == len(tokens), "vLLM pools no rows that are decoded"
        prompts = [{"prompt_token_ids": tokens}]
        outputs = self.pooling.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        rows = outputs[0].outputs.data
        assert len(rows) == len(tokens), f"{len(rows)} rows of {len(tokens)} tokens"
        return rows.float()

    def generate(self, requests, _reason, end_ids):
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True,
                                 stop_token_ids=[] if request.ignores_end else sorted(end_ids),
                                 detokenize=False, extra_args={"request": request})
                  for request in requests]
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        outputs = self.drawing.generate(prompts, params, use_tqdm=False)
        all_rows = []
        for request, output in zip(requests, outputs):
            request.output = list(output.outputs[0].token_ids)
            tokens = request.prompt + request.output[:-1]
            all_rows.append(self.rows(tokens, len(tokens))[len(request.prompt) - 1:])
        return all_rows


def load(args, **options):
    from vllm import LLM

    return LLM(model=str(args.vllm), dtype="bfloat16", max_model_len=4096,
               enable_prefix_caching=False, disable_log_stats=True, **options)


def noise_processor():
    """The class by which vLLM's sampler is left one token: the one that our noise draws."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class NoiseProcessor(AdapterLogitsProcessor):
        def is_argmax_invariant(self):
            return False

        def new_req_logits_processor(self, params):
            request = params.extra_args["request"]

            def leave_one(output, logits):
                position = len(request.prompt) - 1 + len(output)
                token = request.draw(logits.double().numpy(), position)
                return torch.full_like(logits, -torch.inf).index_fill_(
                    0, torch.tensor([token]), 0.0)

            return leave_one

    return NoiseProcessor
