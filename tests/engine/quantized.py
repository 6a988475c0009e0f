"""Quantizes the tiny target's linear layers to the checkpoint formats that vLLM's CPU kernels read.

Letters: N outputs, K inputs of a layer, G inputs that share a scale.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
"""G"""
BITS = 4
PER_INT = 32 // BITS
ZERO = 8
"""Zero point."""
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbouring columns goes into each four bits of an int32, lowest first (AutoAWQ, WQLinear_GEMM)."""

Parts = dict[str, Tensor]


def w8a8(weight: Tensor) -> Parts:
    """compressed-tensors: a scale for each output; activations are quantized by vLLM, row by row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale.float()}


def gptq(weight: Tensor) -> Parts:
    integers, scales = _four_bits(weight)
    groups, num_outputs = scales.shape
    # GPTQ stores the zero point minus one.
    zeros = _pack(torch.full((groups, num_outputs), ZERO - 1).unflatten(1, (-1, PER_INT)))
    qweight = _pack(integers.unflatten(0, (-1, PER_INT)).movedim(1, -1))
    g_idx = torch.arange(len(integers), dtype=torch.int32) // GROUP
    return {"qweight": qweight, "qzeros": zeros, "scales": scales.half(), "g_idx": g_idx}


def awq(weight: Tensor) -> Parts:
    integers, scales = _four_bits(weight)
    zeros = torch.full(scales.shape, ZERO)
    qweight, qzeros = (_pack(each.unflatten(1, (-1, PER_INT))[..., AWQ_ORDER]) for each in (integers, zeros))
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales.half()}


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [K, N] from 0 to 15 and scales [K / G, N]."""
    groups = weight.float().T.unflatten(0, (-1, GROUP))
    scales = groups.abs().amax(dim=1) / (ZERO - 1)
    return ((groups / scales[:, None]).round() + ZERO).long().flatten(0, 1), scales


def _pack(integers: Tensor) -> Tensor:
    """[..., 8] of four bits each -> [...] int32, the first in the lowest bits."""
    packed = (integers << torch.arange(0, 32, BITS)).sum(-1)
    return packed.where(packed < 2**31, packed - 2**32).int()


FORMATS: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any]]] = {
    "compressed-tensors W8A8": (
        w8a8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
                    "input_activations": {
                        "num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True,
                    },
                }
            },
        },
    ),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": BITS, "group_size": GROUP, "desc_act": False, "sym": True}),
    "AWQ": (awq, {"quant_method": "awq", "bits": BITS, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}  # fmt: skip


def quantize(target: Path, name: str, folder: Path) -> None:
    """Write to `folder` the target with its layers in one of FORMATS; embedding and LM head stay as they are."""
    parts_of, quantization = FORMATS[name]
    shutil.copytree(target, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tensors = {}
    for key, weight in load_file(target / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            layer = key.removesuffix("weight")
            tensors |= {layer + part: tensor.contiguous() for part, tensor in parts_of(weight).items()}
        else:
            tensors[key] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
