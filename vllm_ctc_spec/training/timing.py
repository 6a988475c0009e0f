"""Where the time of a training step goes."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

PARTS = ("data", "forward_backward", "optimizer", "rest")


class StepTimes(TrainerCallback):
    """Seconds spent on batches, on forward and backward passes, on the optimizer, and on logs and checkpoints."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._tick: float | None = None

    def _spent_on(self, part: str) -> None:
        now = time.monotonic()
        if self._tick is not None:
            self.seconds[part] += now - self._tick
        self._tick = now

    def shares(self) -> dict[str, float]:
        total = sum(self.seconds.values()) or 1.0
        return {part: seconds / total for part, seconds in self.seconds.items()}

    # Trainer calls on_step_begin after it has fetched the step's batches.
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._spent_on("data")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._spent_on("forward_backward")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._spent_on("optimizer")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._spent_on("rest")

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._spent_on("rest")
