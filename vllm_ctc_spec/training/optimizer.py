"""Muon for a network's matrices, AdamW for its tables and vectors, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from vllm_ctc_spec.machine import bf16_is_fast


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) where its orthogonal updates are meant, that is in linear layers.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float = 0.01) -> None:
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in trained]
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        # A tied LM head is a linear layer, but its weight is a table.
        matrices = [weight for weight in matrices if id(weight) not in tables]
        others = [p for p in model.parameters() if p.requires_grad and all(p is not weight for weight in matrices)]
        self._parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": learning_rate})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state, which schedules change and checkpoints hold."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        with nullcontext() if bf16_is_fast() else _InFloat32():
            for part in self._parts:
                part.step()
        return loss


class _InFloat32(TorchFunctionMode):
    """Muon always orthogonalises in bfloat16 (torch/optim/_muon.py); emulated, that took half of a training step."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A copy, like the conversion: Muon writes into it.
        return args[0].to(torch.float32, copy=True) if func is Tensor.bfloat16 else func(*args, **kwargs or {})
