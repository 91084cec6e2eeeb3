#!/usr/bin/env python3
"""An honest miner on another software stack: Hugging Face transformers on the CPU.

It answers as docs/proofs.md says, so `targon-engine verify` can check what it wrote: energies and
margins of its answers are what honest rounding costs, and limits must leave room for them.

    other_stack.py REQUESTS ANSWERS [--prefill-only] [--dtype bf16|f32] [--attention sdpa|eager]
                   [--weights GRID] [--cache GRID] [--vllm CHECKPOINT]
                   [--llama FILE [--llama-cache TYPE] [--decoded]]

REQUESTS holds JSON lines `{"request": BODY}`, where BODY asks /v1/completions with a list of ids as
prompt and with a proof of residue-v1 or residue-v1-u4. With --prefill-only it holds captured
answers, and only their rows are computed again: the tokens stay those of whoever drew them. With
--weights or --cache it is a cheat, whose matrices or keys and values lie on a coarser grid: what
limits must catch.

With --llama, a GGUF file of bf16 weights, the rows and logits are those of a llama.cpp that was
built; --decoded computes the rows of a captured answer one by one, as its miner does. With --vllm,
a checkpoint directory of bf16, they are vLLM's, run by the Python of an environment that has it:
its rows always come from one pass over an answer. `scripts/bench-peers` makes the files and both
engines.

`pip install torch transformers==5.24.0 gguf blake3`; `scripts/fetch-model` and
`targon-engine calibrate` come first. For GGUF files of the architectures llama and qwen2.
"""

import argparse
import base64
import functools
import json
import os
import pathlib
import struct
import sys
import time

import gguf
import numpy as np
import proof_reference as reference
import torch
import transformers
from blake3 import blake3
from other_engines import Llama, Vllm
from proof_reference import first_u64, ids, listed, named, u32
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

CHUNK_ROWS = 32
SCHEMES = {"residue-v1": 1, "residue-v1-u4": 2}
SIGNS, NOISE = 0x7369676E, 0x736D706C
CONTROL, UNKNOWN, USER_DEFINED = 3, 2, 4  # types of tokens
FLOATS = {"temperature": 1, "top_p": 1, "min_p": 0, "top_a": 0, "repetition_penalty": 1,
          "presence_penalty": 0, "frequency_penalty": 0}
READ = {"prompt", "messages", "max_tokens", "ignore_eos", "seed", "top_k", "proof", *FLOATS}
WITHOUT_EFFECT = {"model", "stream", "logprobs", "top_logprobs", "return_token_ids",
                  "return_tokens_as_token_ids", "logprobs_mode"}
UNANSWERED = {"stream", "logprobs", "top_logprobs", "logprobs_mode"}


def cache_dir():
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("TARGON_CACHE") or pathlib.Path(home) / "targon-engine")


# What proof_reference.py does to one value at a time, here to arrays.


def philox(key, counter):
    """Four words for every counter; its words are integers or arrays."""
    c = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter)]
    low, k = np.uint64(0xFFFFFFFF), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), b & low,
             (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def whiten(calibration, values):
    scale = np.ldexp(np.float32(1), np.array(calibration["exponents"]) + 8)
    scaled = values * scale.astype(np.float32)
    scaled = np.where(np.isfinite(scaled), scaled, 0).clip(-65535, 65535)
    centred = np.rint(scaled) - np.array(calibration["means"], np.float32)
    return centred.clip(-32767, 32767).astype(np.int64)


def sketches(calibration, scheme, key, positions, rows):
    """One sketch of four bytes for each row of 16-bit patterns."""
    q = whiten(calibration, widen(rows))
    blocks = -(-q.shape[1] // 32)
    q = np.pad(q, ((0, 0), (0, blocks * 32 - q.shape[1]))).reshape(len(q), blocks, 32)
    sums = []
    for half in range(SCHEMES[scheme]):
        for words in philox(key, [positions[:, None], np.arange(blocks), half, SIGNS]):
            signs = (words[:, :, None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)) > 0
            sums.append(np.where(signs, q, -q).sum(axis=(1, 2)))
    sums = np.stack(sums, axis=1)
    shift = calibration["shift"] + 2 * (SCHEMES[scheme] - 1)
    residues = (sums + (1 << shift >> 1)) >> shift
    if scheme == "residue-v1":
        return (residues & 255).astype(np.uint8)
    residues &= 15
    return (residues[:, ::2] | residues[:, 1::2] << 4).astype(np.uint8)


def mix(x):
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ x >> np.uint64(33)) * np.uint64(factor)
    return x ^ x >> np.uint64(33)


def exact_hashes(key, positions, rows):
    base = np.uint64(key) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    channels = np.arange(rows.shape[1], dtype=np.uint64) << np.uint64(16)
    return mix(base[:, None] + (channels | rows)).sum(axis=1, dtype=np.uint64)


def check_against_reference():
    """The arrays say what the reference says, on its own vectors."""
    calibration = {"exponents": reference.EXPONENTS, "means": reference.MEANS,
                   "shift": reference.SHIFT}
    key, positions = 0xA63E3EE3B56E9D71, np.arange(10, 13)
    i, c = np.arange(3)[:, None], np.arange(reference.CHANNELS)
    rows = (0x3F00 + (i * 131 + c * 57) % 256).astype(np.uint16)
    drawn = sketches(calibration, "residue-v1", key, positions, rows)
    hashes = exact_hashes(key, positions, rows)
    for row, position in enumerate(positions.tolist()):
        bits = rows[row].tolist()
        assert drawn[row].tobytes() == reference.sketch(key, position, bits)
        assert int(hashes[row]) == reference.exact(key, position, bits)


# Coarser grids, for cheats.


def on_integers(values, group, bits=8, scale_type=torch.float32):
    """Symmetric integers with a scale for each `group` columns; 0 is a whole row."""
    shape, most = values.shape, 2 ** (bits - 1) - 1
    parts = values.float().reshape(-1, group or shape[-1])
    scale = parts.abs().amax(1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, 1).to(scale_type).float()
    return ((parts / scale).round().clamp(-most - 1, most) * scale).reshape(shape).to(values.dtype)


def on_e4m3(values, scale=1.0):
    values = (values.float() / scale).clamp(-448, 448)
    return (values.to(torch.float8_e4m3fn).float() * scale)


def low_rank(values, share):
    """An update of rank 4 with so much of the norm."""
    g = torch.Generator().manual_seed(values.shape[0] * 7 + values.shape[1])
    update = torch.randn(values.shape[0], 4, generator=g) @ torch.randn(4, values.shape[1],
                                                                      generator=g)
    return values.float() + update * (share * values.float().norm() / update.norm())


GRIDS = {
    "int8": lambda x: on_integers(x, 0), "int8-g32": lambda x: on_integers(x, 32),
    "q8_0": lambda x: on_integers(x, 32, scale_type=torch.float16),
    "int4-g32": lambda x: on_integers(x, 32, 4), "int4-g128": lambda x: on_integers(x, 128, 4),
    "fp8": lambda x: on_e4m3(x, x.float().abs().max() / 448), "fp8-unscaled": on_e4m3,
    "rank4-1%": lambda x: low_rank(x, 0.01), "rank4-0.1%": lambda x: low_rank(x, 0.001),
}


class CoarseCache(DynamicCache):
    """Keys and values on a grid: each head at each position by itself."""

    def __init__(self, grid, config):
        super().__init__(config=config)
        self.grid = GRIDS[grid]

    def update(self, keys, values, *args, **kwargs):
        keys, values = (self.grid(x).to(x.dtype) for x in (keys, values))
        return super().update(keys, values, *args, **kwargs)


# What a request says, and what its proof is bound to.


class Request:
    """A body, and the ids that its answer must be drawn or proved for."""

    def __init__(self, capture, is_answered):
        body = self.body = capture["request"]
        unknown = set(body) - READ - WITHOUT_EFFECT
        unknown = {field for field in unknown if (field, body[field]) != ("n", 1)}
        assert not unknown, f"{sorted(unknown)} would change the output and are not built here"
        self.choice, self.output = {}, []
        if is_answered:
            self.choice = choice_of(capture)
            self.output = self.choice["token_ids"]
        prompt = body.get("prompt", self.choice.get("prompt_token_ids"))
        assert isinstance(prompt, list) and prompt, "the prompt must be a list of ids"
        self.prompt = prompt
        self.floats = {name: body.get(name, value) for name, value in FLOATS.items()}
        self.temperature = float(np.float32(self.floats["temperature"]))
        self.top_k = max(body.get("top_k") or 0, 0)
        self.max_tokens = body["max_tokens"]
        self.ignores_end = bool(body.get("ignore_eos"))
        self.scheme = body["proof"]["scheme"]
        nonce = body["proof"].get("nonce") or self.choice.get("proof_end", {}).get("nonce")
        self.nonce = bytes.fromhex(nonce) if nonce else os.urandom(32)
        self.hash = self.terms()
        self.noise_key = first_u64(
            named("targon-engine/sampler/nonce/1", self.nonce, self.hash))

    def terms(self):
        seed = self.body.get("seed")
        return named(
            "targon-engine/request/1", ids(self.prompt), struct.pack("<7f", *self.floats.values()),
            u32(self.top_k), u32(0), bytes([seed is not None]), struct.pack("<q", seed or 0),
            u32(0), u32(self.max_tokens), u32(0), bytes([self.ignores_end]), ids([]), u32(0),
            b"\0")

    def root(self, model):
        scheme = bytes([SCHEMES[self.scheme]])
        return named("targon-engine/proof/1", scheme, self.nonce, self.hash, model, bytes(32))

    def draw(self, logits, position):
        """The token of a row of f64 logits."""
        if self.temperature < 1e-5:
            return int(np.argmax(logits))
        words = np.stack(philox(self.noise_key, [position, np.arange(-(-len(logits) // 4)), 0,
                                                 NOISE]), axis=1).reshape(-1)[: len(logits)]
        race = logits / self.temperature - np.log(-np.log((words + 0.5) / 2.0**32))
        kept = self.survivors(logits)
        return int(np.argmax(race)) if kept is None else int(kept[np.argmax(race[kept])])

    def survivors(self, logits):
        """Ids that min-p, top-a, top-k and top-p leave, ascending; None where they leave all."""
        top_p, min_p, top_a = (self.floats[name] for name in ("top_p", "min_p", "top_a"))
        if (top_p, min_p, top_a) == (1, 0, 0) and not 0 < self.top_k < len(logits):
            return None
        weights = np.exp((logits - logits.max()) / self.temperature)
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        floor = max(min_p, top_a / weights.sum())
        order = order[: max(1, int((weights[order] >= floor).sum()))]
        if top_p < 1:
            sums = np.cumsum(weights[order])
            order = order[: np.searchsorted(sums, top_p * sums[-1]) + 1]
        return np.sort(order)


def choice_of(capture):
    """The first choice of a captured answer, whole or streamed."""
    if capture.get("response"):
        response = capture["response"]
        choice = response["choices"][0]
        text = choice.get("message", choice).get("content", choice.get("text"))
        return {"prompt_token_ids": response.get("prompt_token_ids"), **choice, "text": text}
    whole = {"token_ids": [], "text": ""}
    for chunk in capture["chunks"]:
        for choice in chunk["choices"]:
            whole["token_ids"] += choice.get("token_ids") or []
            whole["text"] += choice.get("delta", choice).get("content", choice.get("text")) or ""
            prompt = choice.get("prompt_token_ids") or chunk.get("prompt_token_ids")
            whole.update({"prompt_token_ids": prompt} if prompt else {})
            for field in ("finish_reason", "proof_end"):
                whole.update({field: choice[field]} if choice.get(field) else {})
    return whole


# The model.


HF_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
ARCHITECTURES = ("llama", "qwen2")  # by the names that transformers has for them too
HF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hf_name(name):
    part, suffix = name.rsplit(".", 1)
    if part in HF_NAMES:
        return f"{HF_NAMES[part]}.{suffix}"
    _, layer, part = part.split(".")
    return f"model.layers.{layer}.{HF_PARTS[part]}.{suffix}"


def stored_name(name):
    """A type as the engine calls it: Q4_K is Q4K."""
    return name.replace("_K", "K").encode()


class File:
    """A GGUF file: weights, configuration, vocabulary, and the hash of its weights."""

    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.architecture = self.get("general.architecture")
        assert self.architecture in ARCHITECTURES, f"{self.architecture} is not built"
        assert self.own("rope.scaling.type") in (None, "none"), "no rope scaling is built"
        self.tensors = sorted(self.reader.tensors, key=lambda tensor: hf_name(tensor.name))
        self.heads = self.own("attention.head_count")
        self.kv_heads = self.own("attention.head_count_kv") or self.heads
        names = ["eos_token_id", "eot_token_id", "eom_token_id"]
        self.end_ids = {self.get(f"tokenizer.ggml.{name}") for name in names} - {None}

    def get(self, key):
        field = self.reader.fields.get(key)
        return field.contents() if field else None

    def own(self, key):
        return self.get(f"{self.architecture}.{key}")

    def weights_root(self):
        """In order of the Hugging Face names, each under the file's own name."""
        parts = []
        for tensor in self.tensors:
            shape = tensor.shape.tolist()[::-1]
            parts += [listed(tensor.name.encode()), listed(stored_name(tensor.tensor_type.name)),
                      u32(len(shape)), struct.pack(f"<{len(shape)}q", *shape),
                      blake3(tensor.data.tobytes()).digest()]
        return named("targon-engine/weights/1", u32(len(self.tensors)), *parts)

    def state(self):
        """The weights, rounded to bf16."""
        state = {}
        for tensor in self.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = torch.from_numpy(np.array(values, np.float32))
            for part, heads in (("attn_q.", self.heads), ("attn_k.", self.kv_heads)):
                if part in tensor.name and self.architecture == "llama":
                    # llama.cpp interleaves the rotary halves of each head.
                    pairs = values.view(heads, values.shape[0] // heads // 2, 2, -1)
                    values = pairs.transpose(1, 2).reshape(values.shape)
            state[hf_name(tensor.name)] = values.to(torch.bfloat16)
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        return state

    def config(self):
        length = self.own("attention.key_length")
        return AutoConfig.for_model(
            self.architecture,
            vocab_size=len(self.get("tokenizer.ggml.tokens")),
            hidden_size=self.own("embedding_length"),
            intermediate_size=self.own("feed_forward_length"),
            num_hidden_layers=self.own("block_count"),
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.own("context_length"),
            rms_norm_eps=self.own("attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default",
                             "rope_theta": self.own("rope.freq_base") or 10000.0},
            tie_word_embeddings=not any(t.name == "output.weight" for t in self.tensors),
            **({"head_dim": length} if length else {}),
        )

    @functools.cached_property
    def token_bytes(self):
        """What each id spells: nothing for special ones."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        table = {chr(byte): byte for byte in printable}
        table.update({chr(256 + i): byte for i, byte in enumerate(others)})
        all_bytes = []
        for token, kind in zip(self.get("tokenizer.ggml.tokens"),
                               self.get("tokenizer.ggml.token_type")):
            if kind in (CONTROL, UNKNOWN):
                all_bytes.append(b"")
            elif kind == USER_DEFINED or any(c not in table for c in token):
                all_bytes.append(token.encode())
            else:
                all_bytes.append(bytes(table[c] for c in token))
        return all_bytes

    def text(self, output):
        return b"".join(self.token_bytes[id] for id in output).decode(errors="replace")


class Stack:
    """The model in transformers, and the proofs of its rows."""

    def __init__(self, args):
        torch.set_num_threads(args.threads)
        self.file, self.logits_f32 = File(args.model), args.logits == "f32"
        weights = self.file.weights_root()
        self.calibrate(args, weights)
        # Not the engine's order of additions: a verifier compares by energies.
        other = f"llama-cpp-{args.llama_cache}" if args.llama else "vllm-bf16" if args.vllm else None
        self.canon = other or f"transformers-{args.dtype}"
        self.model_hash = named("targon-engine/model/2", weights, listed(b"bf16"),
                                listed(self.canon.encode()), self.calibration_hash())
        self.other, self.decodes = None, args.decoded
        if other:
            self.other = Llama(args, cache_dir(), self.file) if args.llama else Vllm(args)
            return
        # Earlier ones take no notice of a cache that is given by this name.
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        assert version >= (5, 24), f"transformers 5.24 or newer, not {transformers.__version__}"
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[args.dtype]
        self.model = AutoModelForCausalLM.from_config(
            self.file.config(), dtype=dtype, attn_implementation=args.attention).eval()
        state = self.file.state()
        for name, values in state.items() if args.weights else ():
            if name.startswith("model.layers.") and values.dim() == 2:
                state[name] = GRIDS[args.weights](values).to(torch.bfloat16)
        self.model.load_state_dict(state)
        self.cache_grid = args.cache

    def calibrate(self, args, weights):
        """Reads the whitening of rows that the engine has stored."""
        path = args.calibration or self.calibration_path(weights)
        self.calibration = json.loads(path.read_text())
        stored = self.calibration["weights_root"]
        assert stored == weights.hex(), f"{path} is for weights {stored}, these are {weights.hex()}"

    def calibration_hash(self):
        exponents, means = self.calibration["exponents"], self.calibration["means"]
        return named(
            "targon-engine/calibration/1", u32(len(means)), bytes([self.calibration["shift"]]),
            struct.pack(f"<{len(means)}b", *exponents), struct.pack(f"<{len(means)}h", *means))

    @staticmethod
    def calibration_path(weights):
        path = cache_dir() / "calibration" / f"{weights[:16].hex()}-bf16.json"
        assert path.exists(), f"there is no {path}: run `targon-engine calibrate` first"
        return path

    def forward(self, tokens, mask, cache):
        """Final-norm rows of the new tokens; `mask` covers the cached ones too."""
        if cache is None and self.cache_grid:
            cache = CoarseCache(self.cache_grid, self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1]:]
        return self.model.model(input_ids=tokens, attention_mask=mask, position_ids=positions,
                                cache=cache, use_cache=True).last_hidden_state

    def logits(self, rows):
        if self.logits_f32:
            return (rows.float() @ self.model.lm_head.weight.float().T).double().numpy()
        return self.model.lm_head(rows).double().numpy()

    def generate(self, requests):
        """Answers several requests side by side, shorter prompts padded on the left."""
        if self.other:
            all_rows = self.other.generate(requests, self.reason, self.file.end_ids)
            return [self.answer(request, bits_of(rows), self.reason(request))
                    for request, rows in zip(requests, all_rows)]
        longest = max(len(r.prompt) for r in requests)
        padded = [[0] * (longest - len(r.prompt)) + r.prompt for r in requests]
        mask = torch.tensor([[0] * (longest - len(r.prompt)) + [1] * len(r.prompt)
                             for r in requests])
        config, grid = self.model.config, self.cache_grid
        cache = CoarseCache(grid, config) if grid else DynamicCache(config=config)
        tokens = torch.tensor(padded)
        rows = [[] for _ in requests]
        reasons = [None] * len(requests)
        while None in reasons:
            last = self.forward(tokens, mask, cache)[:, -1]
            scores, bits, drawn = self.logits(last), bits_of(last), []
            for i, request in enumerate(requests):
                position = len(request.prompt) - 1 + len(request.output)
                drawn.append(request.draw(scores[i], position) if reasons[i] is None else 0)
                if reasons[i] is None:
                    rows[i].append(bits[i])
                    request.output.append(drawn[i])
                    reasons[i] = self.reason(request)
            tokens = torch.tensor(drawn)[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        return [self.answer(request, np.stack(own), reason)
                for request, own, reason in zip(requests, rows, reasons)]

    def reason(self, request):
        if not request.ignores_end and request.output[-1] in self.file.end_ids:
            return "stop"
        return "length" if len(request.output) == request.max_tokens else None

    def prefill(self, requests):
        """Proofs of outputs that are there already, each from one pass."""
        answers = []
        for request in requests:
            tokens, prompt = request.prompt + request.output[:-1], len(request.prompt)
            if self.other:
                rows = self.other.rows(tokens, prompt if self.decodes else len(tokens))
            else:
                tokens = torch.tensor([tokens])
                rows = self.forward(tokens, torch.ones_like(tokens), None)[0]
            answers.append(self.answer(request, bits_of(rows)[prompt - 1:],
                                       request.choice["finish_reason"]))
        return answers

    def answer(self, request, rows, reason):
        """A response, with the proof of its rows."""
        output, first = request.output, len(request.prompt) - 1
        digest = root = request.root(self.model_hash)
        sketch_key = first_u64(named("targon-engine/sketch/1", root))
        exact_key = first_u64(named("targon-engine/exact/1", root))
        positions = np.arange(first, first + len(rows))
        drawn = sketches(self.calibration, request.scheme, sketch_key, positions, rows)
        hashes = exact_hashes(exact_key, positions, rows)
        chunks = []
        for start in range(0, len(rows), CHUNK_ROWS):
            own = slice(start, start + CHUNK_ROWS)
            count = u32(len(hashes[own]))
            data = drawn[own].tobytes() + named(
                "targon-engine/chunk/1", root, count, hashes[own].astype("<u8").tobytes())[:8]
            index = len(chunks)
            digest = blake3(digest + u32(index) + ids(output[own]) + listed(data)).digest()
            chunks.append({"index": index, "data": base64.b64encode(data).decode(),
                           "digest": digest.hex()})
        end = {"scheme": request.scheme, "canon": self.canon, "nonce": request.nonce.hex(),
               "model": self.model_hash.hex(), "root": root.hex(), "tokens": len(output)}
        shown = output[:-1] if reason == "stop" else output
        text = request.choice.get("text") or self.file.text(shown)
        is_chat = "messages" in request.body
        words = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        choice = {"index": 0, **words, "token_ids": output, "finish_reason": reason,
                  "proof": chunks, "proof_end": end}
        # What was asked and is not answered here would be missed; a proof is bound to its nonce.
        asked = {field: value for field, value in request.body.items() if field not in UNANSWERED}
        asked["proof"] = {**asked["proof"], "nonce": request.nonce.hex()}
        return {"request": asked, "response": {"choices": [choice]}}


def bits_of(rows):
    """Rows as the 16-bit patterns that are proved."""
    assert torch.isfinite(rows).all(), "a row is not finite"
    return rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("requests", type=pathlib.Path)
    parser.add_argument("answers", type=pathlib.Path)
    home = os.environ.get("TARGON_ENGINE_MODELS") or "~/.cache/targon-engine/models"
    default = pathlib.Path(home).expanduser() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    parser.add_argument("--model", type=pathlib.Path, default=default, help="a GGUF file")
    parser.add_argument("--calibration", type=pathlib.Path,
                        help="what `targon-engine calibrate` stored, where it lies elsewhere")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16",
                        help="the type of the arithmetic; weights are rounded to bf16 in either")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--weights", choices=GRIDS, help="a cheat: matrices on this grid")
    parser.add_argument("--cache", choices=GRIDS, help="a cheat: keys and values on this grid")
    parser.add_argument("--logits", choices=["native", "f32"], default="native",
                        help="native: in the type of the arithmetic, as transformers has them")
    parser.add_argument("--llama", type=pathlib.Path, help="a GGUF file of bf16, for llama.cpp")
    parser.add_argument("--vllm", type=pathlib.Path, help="a checkpoint directory, for vLLM")
    parser.add_argument("--llama-cache", choices=["f16", "bf16", "f32"], default="f16",
                        help="the type of llama.cpp's keys and values")
    parser.add_argument("--decoded", action="store_true", help="llama.cpp computes row by row")
    parser.add_argument("--batch", type=int, default=16, help="requests side by side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill-only", action="store_true",
                        help="prove the tokens of captured answers")
    args = parser.parse_args()
    other = args.llama or args.vllm
    assert not (args.llama and args.vllm), "either --llama or --vllm"
    # What has no effect would be taken for what was measured.
    assert not (other and (args.weights or args.cache)), "cheats are computed by transformers alone"
    assert args.llama and args.prefill_only or not args.decoded, (
        "--decoded goes only with --llama and --prefill-only")
    return args


@torch.inference_mode()
def main():
    args = arguments()
    check_against_reference()
    lines = [json.loads(line) for line in args.requests.read_text().splitlines() if line.strip()]
    requests = [Request(line, args.prefill_only) for line in lines]
    stack = Stack(args)
    run = stack.prefill if args.prefill_only else stack.generate
    began, count = time.monotonic(), 0
    with args.answers.open("w") as file:
        for start in range(0, len(requests), args.batch):
            for answer in run(requests[start:start + args.batch]):
                file.write(json.dumps(answer) + "\n")
                count += len(answer["response"]["choices"][0]["token_ids"])
    seconds = time.monotonic() - began
    print(f"{len(requests)} answers, {count} tokens, {count / seconds:.1f} tokens/s; "
          f"{stack.canon}" + ("" if stack.other else f", torch {torch.__version__}, {args.attention}"),
          file=sys.stderr)


if __name__ == "__main__":
    main()
