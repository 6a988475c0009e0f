"""A tiny target that writes Python, and its drafter; both are trained in about a minute, without a network."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from tests.tiny_pair.corpus import write_corpus
from tests.tiny_pair.target import train_target
from vllm_ctc_spec.machine import target_dtype
from vllm_ctc_spec.training.fit import FitSettings, fit
from vllm_ctc_spec.training.loop import Budget
from vllm_ctc_spec.training.prompts import read_prompts
from vllm_ctc_spec.training.regenerate import RegenerateSettings, regenerate

DRAFTER = {"num_frames": 8, "label_length": 8, "condition_rank": 128}


@dataclass(frozen=True)
class TinyPair:
    target: Path
    drafter: Path
    rows: Path
    """JSONL of the target's answers, on which the drafter was trained."""
    prompts: Path
    """JSONL of `prompt`, from files that neither model was trained on."""


def build_tiny_pair(folder: Path) -> TinyPair:
    """Make the missing parts in `folder`; a part is written whole or not at all."""
    target, drafter, rows, corpus = (folder / name for name in ("target", "drafter", "rows.jsonl", "corpus"))
    if not corpus.exists():
        write_corpus(corpus)
    if not target.exists():
        train_target(corpus / "texts.jsonl", target)
    if not rows.exists():
        _write_rows(target, corpus / "prompts.jsonl", rows)
    if not drafter.exists():
        fit(str(target), rows, drafter, FitSettings(budget=Budget(max_steps=200), learning_rate=8e-3, drafter=DRAFTER))
    return TinyPair(target, drafter, rows, corpus / "heldout.jsonl")


def _write_rows(target: Path, prompts: Path, rows: Path) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    growing = rows.with_name(f"{rows.name}.partial")
    regenerate(
        str(target),
        read_prompts(prompts, AutoTokenizer.from_pretrained(target)),
        growing,
        RegenerateSettings(temperatures=(0.0, 0.4), max_tokens=64),
        # The checkpoint's type, bfloat16, is slow where the processor has to emulate it.
        dtype=target_dtype(),
        max_model_len=1024,
        # Compiling would take longer than generating.
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 27,
    )
    os.replace(growing, rows)
