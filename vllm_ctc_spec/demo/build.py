"""`build_demo`: corpus -> target -> regenerated rows -> drafter, each stage built once and cached."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_ctc_spec.demo.corpus import write_corpus
from vllm_ctc_spec.demo.scale import DemoScale
from vllm_ctc_spec.demo.target import train_target
from vllm_ctc_spec.training.data import read_prompts
from vllm_ctc_spec.training.regenerate import RegenerateSettings, regenerate
from vllm_ctc_spec.training.target import target_dtype
from vllm_ctc_spec.training.trainer import FitSettings, fit
from vllm_ctc_spec.user_cache import user_cache


@dataclass(frozen=True)
class DemoPaths:
    target: Path
    drafter: Path
    prompts: Path
    """JSONL of `prompt` texts from files that no training stage saw."""


def build_demo(
    cache_dir: Path | None = None, scale: DemoScale | None = None, report: Callable[[str], None] = print
) -> DemoPaths:
    """Build what is missing and return the paths; a run that was interrupted is taken up where it stopped."""
    scale = scale or DemoScale.full()
    root = (cache_dir or user_cache("demo")) / scale.name
    corpus, target, rows, drafter = (root / name for name in ("corpus", "target", "rows.jsonl", "drafter"))
    stages = (
        _Stage("corpus, the standard library's source code", corpus, lambda: write_corpus(corpus, scale)),
        _Stage("target, a small Llama trained on it", target, lambda: train_target(corpus, target, scale)),
        _Stage("rows, what the target writes itself", rows, lambda: _regenerate(target, corpus, rows, scale)),
        _Stage("drafter, trained on these rows", drafter, lambda: _fit(target, rows, drafter, scale)),
    )
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / ".lock"):
        for number, stage in enumerate(stages, start=1):
            stage.run(f"[{number}/{len(stages)}] {stage.title}", report)
    return DemoPaths(target, drafter, corpus / "heldout.jsonl")


@dataclass(frozen=True)
class _Stage:
    title: str
    output: Path
    """Exists only when it is whole."""
    build: Callable[[], object]

    def run(self, line: str, report: Callable[[str], None]) -> None:
        if self.output.exists():
            report(f"{line}: cached in {self.output}")
            return
        report(f"{line} ...")
        start = time.monotonic()
        self.build()
        report(f"{line}: {time.monotonic() - start:.0f} s, {self.output}")


def _regenerate(target: Path, corpus: Path, rows: Path, scale: DemoScale) -> None:
    prompts = read_prompts(corpus / "prompts.jsonl", AutoTokenizer.from_pretrained(target))
    growing = rows.with_name(f"{rows.name}.partial")
    settings = RegenerateSettings(scale.temperatures, max_tokens=scale.num_new_tokens)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    regenerate(str(target), prompts, growing, settings, **_engine_options(scale))
    os.replace(growing, rows)


def _engine_options(scale: DemoScale) -> dict[str, Any]:
    return {
        # The checkpoint's own, bfloat16, is slow where the processor has to emulate it.
        "dtype": target_dtype(),
        "max_model_len": scale.max_position_embeddings,
        # Compiling takes longer than so many tokens of so small a model.
        "enforce_eager": True,
        # vLLM refuses to start when it cannot have this share of the memory; a small model needs little of it.
        "gpu_memory_utilization": 0.25,
    }


def _fit(target: Path, rows: Path, drafter: Path, scale: DemoScale) -> None:
    settings = FitSettings(budget=scale.drafter_budget, learning_rate=scale.drafter_rate, drafter=scale.drafter)
    fit(str(target), rows, drafter, settings)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A second build of the same demo waits for the first; the lock dies with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
