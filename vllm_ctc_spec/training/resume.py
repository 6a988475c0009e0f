"""Checkpoints that are whole or not used, and the settings that a resumed run must share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vllm_ctc_spec.training.atomic import write_atomically

WHOLE = "whole"
"""A file that is written into a checkpoint last. Trainer writes the others one by one, into their final place."""

RECORD = "settings.json"
"""The settings of the run that has claimed the folder."""


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


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Create the checkpoints' folder, or make sure that the run to be resumed there had the same settings.

    settings: JSON values, one level. Raises ValueError that names the first setting that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, folder / RECORD, settings)


def claim_file(path: Path, settings: dict[str, Any]) -> None:
    """The same for a file of lines, whose settings stand beside it; those of a file without lines are written anew."""
    record = path.with_name(f"{path.name}.settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.stat().st_size:
        record.unlink(missing_ok=True)
    _claim(path, record, settings)


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a run of the same settings has ended in `folder`, which it claimed there.

    Raises ValueError where anything else stands in it.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    record = folder / RECORD
    if not record.exists():
        raise ValueError(
            f"{str(folder)!r} is there already, and does not say of which run. Name another folder, or delete it to "
            "train again."
        )
    _claim(folder, record, settings, is_done=True)
    return True


def _claim(claimed: Path, record: Path, settings: dict[str, Any], is_done: bool = False) -> None:
    settings = json.loads(json.dumps(settings))
    if not record.exists():
        write_atomically(record, json.dumps(settings, indent=2).encode())
        return
    earlier = json.loads(record.read_text())
    for name in settings.keys() | earlier.keys():
        if settings.get(name) != earlier.get(name):
            run = "a run" if is_done else "an unfinished run"
            raise ValueError(
                f"{str(claimed)!r} holds {run} with {name}={earlier.get(name)!r}; this one has "
                f"{settings.get(name)!r}. Go on with the earlier value, or delete the "
                f"{'folder' if claimed.is_dir() else 'file'} to start again."
            )
