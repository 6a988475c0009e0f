"""Parts of a training run that drafters and benchmark baselines share: budget, schedule, optimizer, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import ExportableState, ProgressCallback

from vllm_ctc_spec.config import did_you_mean
from vllm_ctc_spec.files import RECORD, write_atomically
from vllm_ctc_spec.machine import bf16_is_fast


def processes() -> PartialState:
    """The processes of this training run: those that torchrun started, or just this one."""
    return PartialState(cpu=not torch.cuda.is_available())


def loop_arguments(checkpoints: Path, budget: Budget, batch_size: int, **options: Any) -> TrainingArguments:
    """Arguments of transformers' Trainer. options: fields of TrainingArguments.

    Raises ValueError for an unknown field, and for a `report_to` whose package is not installed.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in options:
        if name not in known:
            raise ValueError(
                f"unknown trainer setting {name!r}.{did_you_mean(name, known)} Settings are the fields of "
                "transformers.TrainingArguments."
            )
    _check_report_to(options.get("report_to"))
    defaults = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": bf16_is_fast(),
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=batch_size,
        max_steps=budget.max_steps,
        remove_unused_columns=False,
        **defaults | options,
    )


def _check_report_to(report_to: str | Sequence[str] | None) -> None:
    usable = ("none", "all", *get_available_reporting_integrations())
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name not in usable:
            raise ValueError(
                f"report_to={name!r}: transformers has no such integration, or its package is not installed. Install "
                f"it, or use one of {', '.join(usable)}."
            )


def train_or_resume(trainer: Trainer, clock: BudgetCallback) -> None:
    """Train, from the last whole checkpoint if a killed run left one."""
    trainer.add_callback(MarkCompleteCheckpoints())
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BudgetBar(clock))
    with processes().main_process_first():
        checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def report(trainer: Trainer, clock: BudgetCallback, times: StepTimes) -> dict[str, Any]:
    """Steps, seconds, shares of time (see StepTimes) and logged losses of a run, as JSON values."""
    return {
        "steps": trainer.state.global_step,
        "seconds": clock.elapsed,
        "time_shares": times.shares(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished run. Other files in `folder`, such as TensorBoard's, stay."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (folder / RECORD).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


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
    """Measures the progress in steps and seconds; it drives the learning rate and ends the training.

    With a schedule over steps alone, a time limit could end the training at a high learning rate. Checkpoints keep the
    elapsed time.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.elapsed = 0.0
        self._tick = time.monotonic()

    def state(self) -> dict[str, Any]:
        """State to keep in checkpoints, in ExportableState's layout."""
        return {"args": {}, "attributes": {"elapsed": self.elapsed}}

    def progress(self, step: int) -> float:
        return max(step / self.budget.max_steps, self.elapsed / self.budget.max_seconds)

    def rate(self, step: int) -> float:
        """Learning rate relative to its peak: linear warm-up, then a cosine down to FINAL_RATE."""
        progress = min(self.progress(step), 1.0)
        if progress < self.budget.warmup:
            return max(progress / self.budget.warmup, 0.02)
        descent = (progress - self.budget.warmup) / (1 - self.budget.warmup)
        return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * descent)) / 2

    def schedule(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.rate)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer would restore a new object, but the schedule refers to this one.
        self.elapsed = state.stateful_callbacks[type(self).__name__]["attributes"]["elapsed"]
        self._tick = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.elapsed = _longest_elapsed(self.elapsed + now - self._tick)
        self._tick = now
        if self.progress(state.global_step) >= 1:
            control.should_training_stop = True


class BudgetBar(ProgressCallback):
    """Trainer's progress bar, whose total is the number of steps that the budget allows at the speed so far."""

    def __init__(self, clock: BudgetCallback) -> None:
        super().__init__()
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.total = round(state.global_step / min(self.clock.progress(state.global_step), 1.0))
        super().on_step_end(args, state, control, **kwargs)


def _longest_elapsed(elapsed: float) -> float:
    """Seconds, the largest `elapsed` of all processes. They must end at the same step, or some would wait for ever."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return elapsed
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    longest = torch.tensor(elapsed, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    return float(longest)


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the weights of linear layers, AdamW for all others.

    Muon's updates are scaled to the size of AdamW's, so that both take the same learning rate.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float = 0.01) -> None:
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in trained]
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        # A tied LM head is a linear layer, but its weight is the embedding table, which Muon is not meant for.
        matrices = [weight for weight in matrices if id(weight) not in tables]
        others = [p for p in model.parameters() if p.requires_grad and all(p is not weight for weight in matrices)]
        self._parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": learning_rate})
        self._share()

    def _share(self) -> None:
        """Let both parts use this optimizer's groups and state, which schedules change and checkpoints store."""
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
    """Lets Muon orthogonalise in float32. By itself it always uses bfloat16 (torch/optim/_muon.py), which takes half of
    a training step where the processor emulates it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A copy, as the conversion to bfloat16 would be, because Muon writes into it.
        return args[0].to(torch.float32, copy=True) if func is Tensor.bfloat16 else func(*args, **kwargs or {})


PARTS = ("data", "forward_backward", "optimizer", "rest")


class StepTimes(TrainerCallback):
    """Seconds by PARTS: fetching batches, forward and backward passes, optimizer, and the rest (logs, checkpoints)."""

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

    # Trainer calls on_step_begin after fetching the step's batches.
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


WHOLE = "whole"
"""File that marks a complete checkpoint. It is written last; Trainer writes the others in place, one by one."""


class MarkCompleteCheckpoints(TrainerCallback):
    """Writes WHOLE into each checkpoint when Trainer has written the rest."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            write_atomically(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE, b"")


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None; incomplete ones, left by a killed run or a full disk, are removed."""
    whole = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / WHOLE).exists():
            whole[int(checkpoint.name.removeprefix("checkpoint-"))] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return whole[max(whole)] if whole else None
