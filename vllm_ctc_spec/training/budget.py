"""How long to train: a number of steps, a number of seconds, or whichever ends first."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

FINAL_RATE = 0.05
"""Learning rate at the end of the budget, relative to the peak."""


@dataclass(frozen=True)
class Budget:
    max_steps: int
    max_seconds: float = math.inf
    warmup: float = 0.05
    """Share of the budget over which the learning rate rises."""

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.max_seconds <= 0:
            raise ValueError(f"training budget {self}: both max_steps and max_seconds must be positive.")


class BudgetCallback(TrainerCallback, ExportableState):
    """Keeps the clock, also across checkpoints; its progress drives the schedule and the end of training.

    A schedule over steps alone would be cut off at a high learning rate on a machine that is too slow for them.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.elapsed = 0.0
        self._tick = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this object, in the form that ExportableState asks for."""
        return {"args": {}, "attributes": {"elapsed": self.elapsed}}

    def progress(self, step: int) -> float:
        return max(step / self.budget.max_steps, self.elapsed / self.budget.max_seconds)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to FINAL_RATE."""
        progress = min(self.progress(step), 1.0)
        if progress < self.budget.warmup:
            return max(progress / self.budget.warmup, 0.02)
        descent = (progress - self.budget.warmup) / (1 - self.budget.warmup)
        return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * descent)) / 2

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.rate)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer's own restoring would replace this object, which the schedule holds.
        self.elapsed = state.stateful_callbacks[type(self).__name__]["attributes"]["elapsed"]
        self._tick = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.elapsed = _latest(self.elapsed + now - self._tick)
        self._tick = now
        if self.progress(state.global_step) >= 1:
            control.should_training_stop = True


class BudgetBar(ProgressCallback):
    """Trainer's own bar, over as many steps as the budget will allow at the speed so far."""

    def __init__(self, clock: BudgetCallback) -> None:
        super().__init__()
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.total = round(state.global_step / min(self.clock.progress(state.global_step), 1.0))
        super().on_step_end(args, state, control, **kwargs)


def _latest(elapsed: float) -> float:
    """Processes that train together must agree on when the budget ends, or the others wait for ever."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return elapsed
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    latest = torch.tensor(elapsed, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(latest, torch.distributed.ReduceOp.MAX)
    return float(latest)
