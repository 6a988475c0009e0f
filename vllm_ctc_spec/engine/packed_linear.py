"""The drafter's matrix products on CPU are vLLM's, as the target's are: a weight is packed once, not at every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


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


def pack_linears(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child))
