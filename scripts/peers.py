#!/usr/bin/env python3
"""Speed of another engine on this machine, as one line of JSON: tokens a second by test.

    peers.py export GGUF DIRECTORY            the weights as a Hugging Face checkpoint in bf16
    peers.py shape GGUF                       seeded weights of a 1B-class Llama in bf16
    peers.py requirements PACKAGE             what it asks for, without the builds' names: 2.1+cpu is 2.1
    peers.py table RESULTS                    what `bench-peers` measured
    peers.py vllm CHECKPOINT --threads N
    peers.py openvino GGUF --threads N

Tests: pp512 (prefill of 512 tokens), tg128 (decode of one sequence), tg64_b4, b8, b16 and b64.
The time of a decode is that of an answer less that of the same prompt with one token of output.
"""

import argparse
import json
import pathlib
import statistics
import time

REPEATS = 3
BATCHES = (4, 8, 16, 64)


def prompt(length, seed, vocab):
    """Ids that no cache knows."""
    return [100 + (i * 7919 + seed * 104729) % (min(vocab, 40000) - 100) for i in range(length)]


def measure(seconds):
    """`seconds(batch, prompt, output)` is how long a batch takes."""
    def median(f):
        return statistics.median(f() for _ in range(REPEATS))

    def decode(batch, length, output):
        return batch * (output - 1) / (seconds(batch, length, output) - seconds(batch, length, 1))

    seconds(1, 32, 8)
    figures = {"pp512": median(lambda: 512 / seconds(1, 512, 1)),
               "tg128": median(lambda: decode(1, 16, 128))}
    for batch in BATCHES:
        figures[f"tg64_b{batch}"] = median(lambda: decode(batch, 16, 64))
    return figures


def vllm(path, threads):
    import os

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model=str(path), dtype="bfloat16", max_model_len=2048, max_num_seqs=64,
              enable_prefix_caching=False, skip_tokenizer_init=True, disable_log_stats=True)
    vocab = llm.llm_engine.model_config.get_vocab_size()
    seed = 0

    def seconds(batch, length, output):
        nonlocal seed
        prompts = []
        for _ in range(batch):
            seed += 1
            prompts.append(TokensPrompt(prompt_token_ids=prompt(length, seed, vocab)))
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - started
        assert all(len(answer.outputs[0].token_ids) == output for answer in answers)
        return took

    return measure(seconds)


def openvino(path, threads):
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        options["INFERENCE_PRECISION_HINT"] = ov.Type.bf16
    pipeline = genai.LLMPipeline(str(path), "CPU", **options)
    seed = 0

    def seconds(batch, length, output):
        nonlocal seed
        rows = []
        for _ in range(batch):
            seed += 1
            rows.append(prompt(length, seed, 40000))
        rows = np.array(rows, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(rows), ov.Tensor(np.ones_like(rows)))
        config = genai.GenerationConfig(max_new_tokens=output, ignore_eos=True, do_sample=False)
        started = time.perf_counter()
        answer = pipeline.generate(inputs, config)
        took = time.perf_counter() - started
        assert all(len(tokens) == output for tokens in answer.tokens)
        return took

    return measure(seconds)


def requirements(package):
    from importlib.metadata import requires

    for wanted in requires(package):
        wanted, _, when = wanted.partition(";")
        if "extra ==" not in when:
            print(wanted.partition("+")[0].strip(), when and f";{when}")


def export(gguf, directory):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf, directory = pathlib.Path(gguf), pathlib.Path(directory)
    load = {"gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(gguf.parent, **load).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, torch_dtype=torch.bfloat16, **load)
    # transformers refuses to save what it read from GGUF, though it has widened it by now.
    tied = model.config.tie_word_embeddings
    tensors = {name: tensor.to(torch.bfloat16).contiguous()
               for name, tensor in model.state_dict().items()
               if not (tied and name == "lm_head.weight")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config, indent=1, default=str))


def shape(path):
    """Random weights as a trained model's are scaled; the tokenizer knows its ids and no words."""
    import gguf
    import numpy as np

    layers, hidden, inner, heads, kv_heads, vocab = 16, 2048, 8192, 32, 8, 128256
    noise = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    words = ["<s>", "</s>", *letters, "ab"]
    words += [f"<{i}>" for i in range(len(words), vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (vocab - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def matrix(name, rows, columns):
        values = noise.standard_normal((rows, columns), np.float32) * np.float32(0.02)
        bits = (values.view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, bits.view(np.uint8), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, np.ones(hidden, np.float32))

    matrix("token_embd.weight", vocab, hidden)
    norm("output_norm.weight")
    kv = hidden * kv_heads // heads
    shapes = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
              "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden),
              "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    for layer in range(layers):
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
        for name, (rows, columns) in shapes.items():
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TESTS = ("pp512", "tg128", *(f"tg64_b{batch}" for batch in BATCHES))
NAMES = {"pp512": "prefill 512", "tg128": "decode, batch 1"}


def rounds(place, pattern, read):
    """The median of each test over the rounds that there are."""
    found = [read(path.read_text()) for path in sorted(place.glob(pattern))]
    keys = {key for figures in found for key in figures}
    return {key: statistics.median(f[key] for f in found if key in f) for key in keys}


def llama_bench(text):
    rows = json.loads(text)
    return {"pp512" if row["n_prompt"] > 0 else "tg128": row["avg_ts"] for row in rows}


def llama_batched(text):
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {f"tg64_b{row['pl']}": row["speed_tg"] for row in rows}


def cpu():
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(": ", 1)[1] for line in info if line.startswith("model name"))
    flags = next(line for line in info if line.startswith("flags")).split()
    parts = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{sum(line.startswith('processor') for line in info)} x {name} ({', '.join(parts)})"


def table(place):
    place = pathlib.Path(place)
    ours = rounds(place, "ours-*.json", json.loads)
    llama = rounds(place, "llama-BF16-*.json", llama_bench)
    wide = rounds(place, "llama-F32-*.json", llama_bench)
    llama = {key: max(value, wide.get(key, 0)) for key, value in llama.items()}
    llama |= rounds(place, "batched-*.jsonl", llama_batched)
    peers = {"llama.cpp": llama, "vLLM": rounds(place, "vllm-*.json", json.loads),
             "OpenVINO": rounds(place, "openvino-*.json", json.loads)}
    peers = {name: figures for name, figures in peers.items() if figures}
    print(cpu())
    print(f"ceilings: {ours['read_gb_per_second']:.1f} GB/s read, "
          f"{ours['fma_gflop_per_second']:.0f} GFLOP/s of fused multiply-adds"
          + (f", {ours['dot_gflop_per_second']:.0f} of VDPBF16PS" if "dot_gflop_per_second" in ours else "")
          + (f", {ours['amx_gflop_per_second']:.0f} of AMX" if "amx_gflop_per_second" in ours else ""))
    print("tokens/s, medians of", len(list(place.glob("ours-*.json"))), "rounds, best float type\n")
    print("| test | targon-engine |" + "".join(f" {name} | ratio |" for name in peers))
    print("|---|---|" + "---|---|" * len(peers))
    for test in TESTS:
        cells = [NAMES.get(test, f"decode, batch {test.removeprefix('tg64_b')}"), f"{ours[test]:.1f}"]
        for figures in peers.values():
            there = figures.get(test)
            cells += [f"{there:.1f}", f"{ours[test] / there:.2f}"] if there else ["-", "-"]
        print("| " + " | ".join(cells) + " |")
    print()
    weights, kv, peak = (ours[k] for k in ("weights_bytes", "kv_bytes", "peak_resident_bytes"))
    read = ours["tg128"] * weights / 1e9
    print(f"decode reads {read:.1f} GB/s, {100 * read / ours['read_gb_per_second']:.0f} % of the ceiling")
    print(f"scoring {ours['pp512_scored'] / ours['pp512']:.2f} x bare prefill; "
          f"first token of 32 after {1000 * ours['ttft32_seconds']:.1f} ms")
    if "system1000_b64_seconds" in ours:
        shared, apart = (ours[f"system1000_b64_{kind}seconds"] for kind in ("", "apart_"))
        print(f"64 requests with one system prompt of 1,000 tokens {shared:.1f} s, "
              f"each computing it {apart:.1f} s")
    if "tg64_at_8000" in ours:
        print(f"decode at 8,000 tokens {ours['tg64_at_8000'] / ours['tg128']:.2f} x its speed at 0")
    print(f"load {ours['load_seconds']:.2f} s; peak resident {peak / 1e6:.0f} MB = "
          f"{(peak - kv) / weights:.2f} x weights ({weights / 1e6:.0f} MB) + KV ({kv / 1e6:.0f} MB)")
    if "http_over_engine_b1" in ours:
        print("streams over HTTP against the engine alone (client on the same cores): "
              f"{ours['http_over_engine_b1']:.3f} at batch 1, {ours['http_over_engine_b16']:.3f} at 16")
    quantised = rounds(place, "llama-Q8_0-*.json", llama_bench)
    if quantised:
        print(f"for scale: llama.cpp Q8_0 prefill {quantised['pp512']:.1f}, decode {quantised['tg128']:.1f}")
    for name, what in (("llama.flags", "llama.cpp was built for"), ("missing", "not measured:")):
        if (place / name).exists():
            print(what, "; ".join((place / name).read_text().split("\n")).strip("; "))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "requirements", "shape", "table",
                                              "vllm", "openvino"))
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tools = {"export": export, "requirements": requirements, "shape": shape, "table": table}
    if args.what in tools:
        return tools[args.what](*args.paths)
    peer = {"vllm": vllm, "openvino": openvino}[args.what]
    print(json.dumps(peer(args.paths[0], args.threads)))


if __name__ == "__main__":
    main()
