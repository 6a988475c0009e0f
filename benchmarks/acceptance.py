"""Acceptance length on unseen text, with all tokens and with fewer: fewer candidates, or a smaller draft vocabulary.

    .venv/bin/python benchmarks/acceptance.py TARGET DRAFTER ROWS [--json PATH]

ROWS is text that the target wrote and the drafter was not trained on (`train regenerate`). Trees for random anchors are
walked along that text (vllm_ctc_spec/training/evaluate.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from vllm_ctc_spec.config import MAX_FRAMES, SpecOptions
from vllm_ctc_spec.drafter.checkpoint import check_drafter, load_drafter
from vllm_ctc_spec.tables import console
from vllm_ctc_spec.training.evaluate import TreeChoice, evaluate

BUDGETS = (4, 8, 12, 16, 32, 63)

DEFAULT = SpecOptions().candidates
CANDIDATES = (DEFAULT, 4, 8, 16, 64)
"""Candidates per frame. Other tokens cannot be nodes, and enter the normaliser without their bias."""

MIN_DRAFTED = 512
"""Smallest draft vocabulary to measure."""


def trees(candidates: int) -> list[TreeChoice]:
    chain = SpecOptions(tree="chain", candidates=candidates)
    prefix = SpecOptions(candidates=candidates)
    return [TreeChoice(chain, MAX_FRAMES), *(TreeChoice(prefix, num_nodes) for num_nodes in BUDGETS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options.target, options.drafter, options.rows)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(target: str, drafter: str, rows: Path) -> list[dict[str, Any]]:
    table = Table("", "chain", *map(str, BUDGETS), title="acceptance length")
    results: list[dict[str, Any]] = []

    def add(name: str, drafter: str, candidates: int, restricted: dict[str, int]) -> None:
        measured = evaluate(target, drafter, rows, trees(candidates)).trees
        table.add_row(name, *(f"{each.length:.2f}" for each in measured))
        results.extend({**restricted, **dataclasses.asdict(each)} for each in measured)

    for candidates in CANDIDATES:
        name = f"{candidates} candidates per frame" + " (default)" * (candidates == DEFAULT)
        add(name, drafter, candidates, {"candidates": candidates})
    with tempfile.TemporaryDirectory() as folder:
        for size, fewer in with_fewer_tokens(drafter, Path(folder)):
            add(f"{size} tokens drafted", str(fewer), DEFAULT, {"drafted": size})
    console().print(table)
    return results


def with_fewer_tokens(path: str, folder: Path) -> Iterator[tuple[int, Path]]:
    """Sizes and folders of the drafter with half of its draft vocabulary, a quarter of it and so on, if it has one."""
    size = (check_drafter(path).draft_vocab_size or 0) // 2
    while size >= MIN_DRAFTED:
        drafter = load_drafter(path, torch.float32)
        drafter.draft_only(drafter.draft_vocab[:size])
        drafter.save_pretrained(folder / str(size))
        yield size, folder / str(size)
        size //= 2


if __name__ == "__main__":
    main()
