"""Checkpoints that are whole or not used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vllm_ctc_spec.files import write_atomically

WHOLE = "whole"
"""A file that is written into a checkpoint last. Trainer writes the others one by one, into their final place."""


class MarkWhole(TrainerCallback):
    """Marks each checkpoint once Trainer has written all of it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            write_atomically(Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE, b"")


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a killed run or a full disk left of others is removed."""
    whole = {}
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / WHOLE).exists():
            whole[int(checkpoint.name.removeprefix("checkpoint-"))] = checkpoint
        else:
            shutil.rmtree(checkpoint)
    return whole[max(whole)] if whole else None
