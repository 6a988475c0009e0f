"""What training asks of transformers' Trainer."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from vllm_ctc_spec.config import did_you_mean
from vllm_ctc_spec.machine import bf16_is_fast
from vllm_ctc_spec.training.budget import Budget, BudgetBar, BudgetCallback
from vllm_ctc_spec.training.resume import MarkWhole, last_whole_checkpoint
from vllm_ctc_spec.training.timing import StepTimes


def processes() -> PartialState:
    """The processes that train together, or this one alone."""
    return PartialState(cpu=not torch.cuda.is_available())


def loop_arguments(checkpoints: Path, budget: Budget, batch_size: int, **options: Any) -> TrainingArguments:
    """`options` are fields of TrainingArguments; an unknown one is refused by name."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in options:
        if name not in known:
            raise ValueError(
                f"unknown trainer setting {name!r}.{did_you_mean(name, known)} Settings are the fields of "
                "transformers.TrainingArguments."
            )
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


def train_or_resume(trainer: Trainer, clock: BudgetCallback) -> None:
    """Go on from the last whole checkpoint, if a killed run left one."""
    trainer.add_callback(MarkWhole())
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BudgetBar(clock))
    with processes().main_process_first():
        checkpoint = last_whole_checkpoint(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def report(trainer: Trainer, clock: BudgetCallback, times: StepTimes) -> dict[str, Any]:
    """What is worth knowing of a run beside its result, as JSON values."""
    return {
        "steps": trainer.state.global_step,
        "seconds": clock.elapsed,
        "time_shares": times.shares(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def drop_checkpoints(folder: Path) -> None:
    """To be called once the result is in place."""
    shutil.rmtree(folder, ignore_errors=True)
