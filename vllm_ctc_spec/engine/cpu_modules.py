"""The drafter's modules on a CPU, with vLLM's kernels as the target has them.

A weight is packed once, not at every call, and what takes PyTorch many small operations is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_ctc_spec.drafter.modeling import CTCDrafter, RMSNorm, Rotary, angles


class PackedLinear(nn.Module):
    """In place of a linear layer without bias."""

    cpu_linear: Any
    """Made by vLLM (vllm/model_executor/layers/utils.py)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Stays, because the tree builder multiplies with one of them itself.
        self.weight = linear.weight
        dispatch_cpu_unquantized_gemm(self, remove_weight=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.cpu_linear(x, self.weight, None)
        return product


class FusedRMSNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        ops.rms_norm(out, x.contiguous(), self.weight, self.eps)
        return out


class TabledRotary(nn.Module):
    """For positions below `num_positions`."""

    def __init__(self, rotary: Rotary, num_positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = rotary.head_dim
        tables = angles(torch.arange(num_positions), rotary.head_dim, rotary.theta, dtype)
        self.table = torch.cat(tables, dim=-1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        rotated = x.clone(memory_format=torch.contiguous_format)
        ops.rotary_embedding(
            positions.flatten(), rotated.view(positions.numel(), -1), None, self.head_dim, self.table, True
        )
        return rotated


def use_vllms_kernels(drafter: CTCDrafter, num_positions: int) -> None:
    """num_positions: of the longest text that is served."""
    dtype = drafter.norm.weight.dtype
    if drafter.config.emission == "conditioned":
        # What the search for trees reads.
        tables = drafter.conditioning
        drafter.state_in_table, drafter.logit_out_table = tables.state_in.float(), tables.logit_out.float()
    replacements: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        nn.Linear: PackedLinear,
        RMSNorm: FusedRMSNorm,
        # Frames stand behind the text.
        Rotary: lambda rotary: TabledRotary(rotary, num_positions + drafter.config.num_frames + 1, dtype),
    }
    for parent in list(drafter.modules()):
        for name, child in parent.named_children():
            if replace := replacements.get(type(child)):
                setattr(parent, name, replace(child))
