"""What both training loops of this package (drafter, demo target) ask of transformers' Trainer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_ctc_spec.training.budget import Budget


def bf16_is_fast() -> bool:
    """True where matrix products have native bfloat16 instructions; emulated, they are slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def loop_arguments(
    checkpoints: Path, budget: Budget, batch_size: int, save_steps: int = 500, log_steps: int = 100, seed: int = 0
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=batch_size,
        max_steps=budget.max_steps,
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16_is_fast(),
        save_steps=save_steps,
        save_total_limit=2,
        logging_steps=log_steps,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )


def train_or_resume(trainer: Trainer) -> None:
    """Go on from the last checkpoint, if a killed run left one."""
    folder = trainer.args.output_dir
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).exists() else None)


def drop_checkpoints(folder: Path) -> None:
    """To be called once the result is in place."""
    shutil.rmtree(folder, ignore_errors=True)
