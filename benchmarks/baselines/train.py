"""Trains vLLM's other drafters, for the same target, rows and time as ours.

    .venv/bin/python benchmarks/baselines/train.py KIND TARGET ROWS OUTPUT --minutes M [--threads N]

KIND: medusa, eagle, eagle3 or draft. ROWS is what `vllm-ctc-spec train regenerate` writes. OUTPUT is a folder that
stock vLLM serves: `vllm.LLM(TARGET, speculative_config={"method": METHOD, "model": OUTPUT,
"num_speculative_tokens": 5})`, where METHOD is KIND, or draft_model for draft; Medusa up to vLLM 0.32 only.

Rows, anchors, schedule, optimizer, precision (bf16 target, float32 trained weights) and loop are those of our own
drafter's training. Learning rate and batch size of each baseline are the best of runs of half a minute, by acceptance
length without an engine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from baseline import Baseline
from draft import DraftModel
from eagle import Eagle, Eagle3
from medusa import Medusa
from transformers import AutoTokenizer, Trainer

from vllm_ctc_spec.files import atomic_folder, write_atomically
from vllm_ctc_spec.training.data import AnchorDataset, collate_anchors, read_rows, with_anchors
from vllm_ctc_spec.training.loop import (
    Budget,
    BudgetCallback,
    MuonAdamW,
    StepTimes,
    loop_arguments,
    report,
    train_or_resume,
)
from vllm_ctc_spec.training.models import load_target

KINDS: dict[str, type[Baseline]] = {"medusa": Medusa, "eagle": Eagle, "eagle3": Eagle3, "draft": DraftModel}
MAX_LENGTH = 512
"""Tokens; longer rows are cut."""
ALL_ANCHORS = 10**9
"""Every anchor of a row is trained, because the target runs over the whole row anyway."""


def train(kind: str, target_path: str, rows_path: Path, output: Path, budget: Budget) -> Path:
    """Train a baseline and write it to `output`, whole or not at all; `rows_path` is a source of `read_rows`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    target = load_target(target_path)
    baseline = KINDS[kind](target)
    rows = read_rows(rows_path, tokenizer, MAX_LENGTH, vocab_size=target.config.vocab_size)
    usable = with_anchors(rows, baseline.num_labels)
    if not usable:
        raise ValueError(
            f"{str(rows_path)!r} has no row with {baseline.num_labels + 1} trained tokens in sequence, as {kind} "
            "needs. Use longer rows."
        )
    training = _fit(baseline, AnchorDataset(usable, baseline.num_labels, ALL_ANCHORS), budget)
    with atomic_folder(output) as partial:
        baseline.save(partial)
        tokenizer.save_pretrained(partial)
        write_atomically(partial / "training.json", json.dumps(training, indent=2).encode())
    return output


def _fit(baseline: Baseline, dataset: AnchorDataset, budget: Budget) -> dict[str, Any]:
    clock, times = BudgetCallback(budget), StepTimes()
    optimizer = MuonAdamW(baseline, baseline.learning_rate)
    with tempfile.TemporaryDirectory() as unused:
        trainer = Trainer(
            baseline,
            loop_arguments(Path(unused), budget, baseline.batch_size, save_strategy="no", logging_steps=10),
            train_dataset=dataset,
            data_collator=collate_anchors,
            optimizers=(optimizer, clock.schedule(optimizer)),
            callbacks=[clock, times],
        )
        train_or_resume(trainer, clock)
    return report(trainer, clock, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("target", help="Hugging Face folder or name")
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--steps", type=int, default=10**6, help="stop earlier, after so many steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = Budget(options.steps, 60 * options.minutes)
    train(options.kind, options.target, options.rows, options.output, budget)


if __name__ == "__main__":
    main()
