#!/usr/bin/env python3
"""Matrices as other libraries quantise and store them, for tests/data/quantised.

    quantised_vectors.py DIRECTORY

Each directory holds `config.json` and `model.safetensors`: the tensors of module `m`, packed by the
code of vLLM, compressed-tensors and torch, and `expected`, what that code makes of them again.
Run it with the Python of an environment that has vLLM 0.32 (`scripts/bench-peers` makes one).
"""

import json
import pathlib
import sys

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.scalar_type import scalar_types

OUTPUTS, INPUTS, GROUP = 24, 64, 32


def weights(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)


def gptq(bits, kind):
    """Codes of inputs in columns; zeros of the first format are stored as one less."""
    expected, codes, scales = quant_utils.gptq_quantize_weights(
        weights(bits, torch.float16).T.contiguous(), kind, GROUP)
    zeros = torch.full((INPUTS // GROUP, OUTPUTS), 2 ** (bits - 1) - 1, dtype=torch.int32)
    return {"m.qweight": quant_utils.gptq_pack(codes, bits, INPUTS, OUTPUTS),
            "m.qzeros": quant_utils.pack_cols(zeros, bits, INPUTS // GROUP, OUTPUTS),
            "m.scales": scales, "expected": expected.T.contiguous()}


def gptq_by_activation():
    """Groups whose inputs are no neighbours, zeros of their own, the second format."""
    generator = torch.Generator().manual_seed(5)
    count = INPUTS // GROUP
    groups = torch.randperm(INPUTS, generator=generator).to(torch.int32) % count
    codes = torch.randint(16, (INPUTS, OUTPUTS), generator=generator, dtype=torch.int32)
    zeros = torch.randint(16, (count, OUTPUTS), generator=generator, dtype=torch.int32)
    scales = torch.rand(count, OUTPUTS, generator=generator).to(torch.float16)
    expected = (codes - zeros[groups.long()]).to(torch.float16) * scales[groups.long()]
    return {"m.qweight": quant_utils.gptq_pack(codes, 4, INPUTS, OUTPUTS),
            "m.qzeros": quant_utils.pack_cols(zeros, 4, count, OUTPUTS),
            "m.scales": scales, "m.g_idx": groups, "expected": expected.T.contiguous()}


def gptq_of_two_bits():
    """Codes that vLLM does not pack with zeros of their own, in groups of which the last is cut off."""
    generator = torch.Generator().manual_seed(6)
    size, outputs = 24, 32
    count = -(-INPUTS // size)
    codes = torch.randint(4, (INPUTS, outputs), generator=generator, dtype=torch.int32)
    zeros = torch.randint(3, (count, outputs), generator=generator, dtype=torch.int32)
    scales = torch.rand(count, outputs, generator=generator).to(torch.float16)
    groups = torch.arange(INPUTS) // size
    expected = (codes - zeros[groups] - 1).to(torch.float16) * scales[groups]
    return {"m.qweight": quant_utils.gptq_pack(codes, 2, INPUTS, outputs),
            "m.qzeros": quant_utils.pack_cols(zeros, 2, count, outputs),
            "m.scales": scales, "expected": expected.T.contiguous()}


def awq():
    expected, codes, scales, zeros = quant_utils.quantize_weights(
        weights(1, torch.float16).T.contiguous(), scalar_types.uint4, GROUP, zero_points=True)
    return {"m.qweight": quant_utils.awq_pack(codes, 4, INPUTS, OUTPUTS),
            "m.qzeros": quant_utils.awq_pack(zeros, 4, INPUTS // GROUP, OUTPUTS),
            "m.scales": scales, "expected": expected.T.contiguous()}


def compressed(format, args):
    """What compressed-tensors writes, and what it reads again."""
    args = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    own = weights(2, torch.bfloat16)
    per = {"group": GROUP, "channel": INPUTS, "tensor": INPUTS}[args.strategy]
    grouped = own.float().reshape(OUTPUTS, INPUTS // per, per)
    if args.strategy == "tensor":
        grouped = grouped.reshape(1, 1, -1)
    most = 448.0 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    state = {"weight": own}
    if args.symmetric:
        scale = grouped.abs().amax(2) / most
    else:
        low, high = grouped.amin(2), grouped.amax(2)
        scale = (high - low) / (2 ** args.num_bits - 1)
        zero = torch.round(-(2 ** (args.num_bits - 1)) - low / scale)
        state["weight_zero_point"] = zero.clamp(-8, 7).to(torch.int8)
    state["weight_scale"] = scale.to(torch.bfloat16)
    if args.strategy == "tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    again = compressor.decompress(dict(stored), scheme)["weight"]
    return {f"m.{name}": value for name, value in stored.items()} | {"expected": again}


def fp8_blocks():
    """Blocks of 16 x 32, of which the last is cut off."""
    own, block = weights(3, torch.float32), (16, 32)
    scales = torch.zeros(-(-OUTPUTS // block[0]), INPUTS // block[1])
    expected, codes = torch.zeros(OUTPUTS, INPUTS), torch.zeros(OUTPUTS, INPUTS)
    for i, j in np.ndindex(*scales.shape):
        at = np.s_[i * block[0]:(i + 1) * block[0], j * block[1]:(j + 1) * block[1]]
        scales[i, j] = own[at].abs().max() / 448
        codes[at] = own[at] / scales[i, j]
        expected[at] = codes[at].to(torch.float8_e4m3fn).float() * scales[i, j]
    return {"m.weight": codes.to(torch.float8_e4m3fn), "m.weight_scale_inv": scales,
            "expected": expected.to(torch.bfloat16)}


def main(directory):
    def of_groups(format, args):
        return {"quant_method": "compressed-tensors", "format": format, "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": args}}}

    packed = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    asymmetric = packed | {"symmetric": False}
    packed8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
    grouped8 = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": GROUP}
    int8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    of_gptq = {"quant_method": "gptq", "group_size": GROUP}
    vectors = {
        "gptq-int4": (gptq(4, scalar_types.uint4b8), of_gptq | {"bits": 4}),
        "gptq-int2": (gptq_of_two_bits(), of_gptq | {"bits": 2, "group_size": 24}),
        "gptq-int8": (gptq(8, scalar_types.uint8b128), of_gptq | {"bits": 8}),
        "gptq-v2-act": (gptq_by_activation(), of_gptq | {
            "bits": 4, "desc_act": True, "checkpoint_format": "gptq_v2"}),
        "awq": (awq(), {"quant_method": "awq", "bits": 4, "group_size": GROUP,
                        "version": "gemm", "zero_point": True}),
        "packed": (compressed("pack-quantized", packed), of_groups("pack-quantized", packed)),
        "packed-zeros": (compressed("pack-quantized", asymmetric),
                         of_groups("pack-quantized", asymmetric)),
        "packed-int8": (compressed("pack-quantized", packed8), of_groups("pack-quantized", packed8)),
        "int8-groups": (compressed("int-quantized", grouped8), of_groups("int-quantized", grouped8)),
        "int8": (compressed("int-quantized", int8), of_groups("int-quantized", int8)),
        "fp8-rows": (compressed("float-quantized", fp8), of_groups("float-quantized", fp8)),
        "fp8-tensor": (compressed("float-quantized", fp8 | {"strategy": "tensor"}),
                       {"quant_method": "fp8", "activation_scheme": "dynamic"}),
        "fp8-blocks": (fp8_blocks(), {"quant_method": "fp8", "activation_scheme": "dynamic",
                                      "weight_block_size": [16, 32]}),
    }
    for name, (tensors, config) in vectors.items():
        path = pathlib.Path(directory) / name
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"quantization_config": config})
        (path / "config.json").write_text(text + "\n")
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
        print(name, {n: (str(t.dtype), list(t.shape)) for n, t in tensors.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
