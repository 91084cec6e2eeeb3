#!/usr/bin/env python3
"""Makes tests/data/golden: one tiny random checkpoint per decoder family, with the truth.

Run once, by hand, when a family is added: `pip install torch transformers safetensors`, then
`scripts/golden.py tests/data/golden`. Tests never need it.

Each directory holds a checkpoint as Hugging Face writes it and golden.safetensors:
  ids            (tokens)          input
  logits         (tokens, vocab)   transformers in f32
  canon_logits   (tokens, vocab)   the same with the inputs of every matrix product rounded to the
  canon_hidden   (tokens, hidden)  checkpoint's type, those of attention as well: what the engine
                                   computes but for the order of additions

`scripts/golden.py tests/data/golden --again` keeps checkpoints, ids and logits, and computes the other
two anew.
"""

import importlib
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

BASE = dict(
    vocab_size=64, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=80, max_position_embeddings=128,
    rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
# name: (model_type, type of the checkpoint, overrides)
FAMILIES = {
    "llama": ("llama", torch.bfloat16, dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama-linear": ("llama", torch.bfloat16, dict(
        attention_bias=True,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    "mistral": ("mistral", torch.bfloat16, dict(sliding_window=13)),
    "qwen2": ("qwen2", torch.bfloat16, dict(use_sliding_window=False)),
    "qwen3": ("qwen3", torch.bfloat16, dict(use_sliding_window=False)),
    "gemma2": ("gemma2", torch.bfloat16, dict(
        sliding_window=9, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=24, hidden_activation="gelu_pytorch_tanh", hidden_size=64,
        tie_word_embeddings=True)),
    "phi3": ("phi3", torch.float16, dict(hidden_size=64, sliding_window=20)),
    "mixtral": ("mixtral", torch.bfloat16, dict(
        num_local_experts=4, num_experts_per_tok=2, intermediate_size=32, sliding_window=None)),
    "qwen3_moe": ("qwen3_moe", torch.bfloat16, dict(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False)),
}
TOKENS = 44


def build(model_type, dtype, overrides, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**BASE, **overrides})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                centre = 0.0 if model_type == "gemma2" else 1.0
                p.copy_(centre + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.5 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.2) * 2)
            p.copy_(p.to(dtype).float())
    return model.float().eval()


def run(model, ids):
    rows = []
    hook = model.model.norm.register_forward_hook(lambda m, i, o: rows.append(o))
    with torch.no_grad():
        logits = model(ids).logits[0]
    hook.remove()
    return logits, rows[0][0]


def rounded(model, dtype, ids):
    """The same forward pass with the inputs of matrix products rounded: activations, and queries,
    keys, values and softmax weights, which are relative to the running maximum of blocks of 32."""
    modeling = importlib.import_module(type(model).__module__)
    linear, attention = F.linear, modeling.eager_attention_forward

    def round_(x):
        return x.to(dtype).float()

    def attend(module, query, key, value, mask, scaling, dropout=0.0, softcap=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (round_(x).repeat_interleave(groups, 1) for x in (key, value))
        scores = round_(query) @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask[..., :key.shape[2]]
        top, total, out = torch.full(scores.shape[:3] + (1,), -torch.inf), 0.0, 0.0
        for block, values in zip(scores.split(32, 3), value.split(32, 2)):
            new = torch.maximum(top, block.amax(3, keepdim=True))
            weights, fall = round_(torch.exp(block - new)), torch.exp(top - new)
            total = total * fall + weights.sum(3, keepdim=True)
            out, top = out * fall + weights @ values, new
        return (out / total).transpose(1, 2).contiguous(), None

    F.linear = lambda x, w, b=None: linear(round_(x), w, b)
    modeling.eager_attention_forward = attend
    try:
        return run(model, ids)
    finally:
        F.linear, modeling.eager_attention_forward = linear, attention


def main(out):
    for seed, (name, (model_type, dtype, overrides)) in enumerate(FAMILIES.items()):
        model = build(model_type, dtype, overrides, seed)
        ids = torch.randint(3, BASE["vocab_size"], (1, TOKENS))
        logits, _ = run(model, ids)
        canon_logits, canon_hidden = rounded(model, dtype, ids)
        path = out / name
        shard = "20KB" if name == "qwen2" else "10GB"
        model.to(dtype).save_pretrained(path, max_shard_size=shard)
        (path / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((path / "config.json").read_text())
        config.pop("transformers_version", None)
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({"ids": ids[0].to(torch.int32), "logits": logits.contiguous(),
                   "canon_logits": canon_logits.contiguous(),
                   "canon_hidden": canon_hidden.contiguous()}, path / "golden.safetensors")
        error = (canon_logits - logits).norm() / logits.norm()
        print(f"{name:12} rms {logits.pow(2).mean().sqrt():.3f}  rounding moves logits by {error:.1e}")


def again(out):
    for name, (_, dtype, _) in FAMILIES.items():
        path = out / name
        golden = load_file(path / "golden.safetensors")
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager",
                                                     dtype=torch.float32).eval()
        model.config._experts_implementation = "eager"
        ids = golden["ids"].long()[None]
        logits, _ = run(model, ids)
        assert (logits - golden["logits"]).norm() < 1e-5 * logits.norm(), name
        canon_logits, canon_hidden = rounded(model, dtype, ids)
        moved = (canon_logits - golden["canon_logits"]).norm() / logits.norm()
        error = (canon_logits - logits).norm() / logits.norm()
        save_file({**golden, "canon_logits": canon_logits.contiguous(),
                   "canon_hidden": canon_hidden.contiguous()}, path / "golden.safetensors")
        print(f"{name:12} moved by {moved:.1e}  rounding moves logits by {error:.1e}")


if __name__ == "__main__":
    (again if "--again" in sys.argv else main)(pathlib.Path(sys.argv[1]))
