"""Acceptance length on unseen text, and what restricting its tokens costs.

    .venv/bin/python benchmarks/acceptance.py [--json PATH]
    .venv/bin/python benchmarks/acceptance.py --pair TARGET DRAFTER ROWS [--json PATH]

Of the demo's pair on held-out prompts, which the target first continues with plain vLLM, greedily and at temperature
0.8; or of another pair on rows of its target's text. Trees for random anchors are walked along that text
(vllm_ctc_spec/training/evaluate.py). Tokens are restricted in two ways: to a request's candidates, and to the first
tokens of the draft vocabulary, if the drafter has one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from vllm_ctc_spec.config import MAX_FRAMES, SpecOptions
from vllm_ctc_spec.demo.build import DemoPaths, build_demo
from vllm_ctc_spec.drafter.checkpoint import check_drafter, load_drafter
from vllm_ctc_spec.training.data import read_prompts
from vllm_ctc_spec.training.evaluate import TreeChoice, evaluate
from vllm_ctc_spec.training.regenerate import RegenerateSettings, regenerate

BUDGETS = (4, 8, 12, 16, 32, 63)
TEMPERATURES = (0.0, 0.8)


DEFAULT = SpecOptions().candidates
CANDIDATES = (DEFAULT, 4, 8, 16, 64)
"""Per frame: what is no candidate is no node, and enters the normaliser without its bias."""

FEWEST_DRAFTED = 512


def trees(candidates: int) -> list[TreeChoice]:
    chain = SpecOptions(tree="chain", candidates=candidates)
    return [(chain, MAX_FRAMES), *((SpecOptions(candidates=candidates), num_nodes) for num_nodes in BUDGETS)]


def held_out_rows(paths: DemoPaths, folder: Path) -> dict[float, Path]:
    prompts = read_prompts(paths.prompts, AutoTokenizer.from_pretrained(paths.target))
    files = {}
    for temperature in TEMPERATURES:
        files[temperature] = folder / f"{temperature}.jsonl"
        settings = RegenerateSettings(temperatures=(temperature,), max_tokens=128)
        regenerate(
            str(paths.target), prompts, files[temperature], settings, enforce_eager=True, gpu_memory_utilization=0.25
        )
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", nargs=3, metavar=("TARGET", "DRAFTER", "ROWS"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    if options.pair is not None:
        target, drafter, rows = options.pair
        results += measure(target, drafter, Path(rows), "given rows")
    else:
        paths = build_demo()
        with tempfile.TemporaryDirectory() as folder:
            for temperature, rows in held_out_rows(paths, Path(folder)).items():
                results += measure(str(paths.target), str(paths.drafter), rows, f"temperature {temperature}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(target: str, drafter: str, rows: Path, text: str) -> list[dict[str, Any]]:
    table = Table("", "chain", *map(str, BUDGETS), title=f"acceptance length, {text}")
    results: list[dict[str, Any]] = []

    def add(name: str, drafter: str, candidates: int, restricted: dict[str, int]) -> None:
        measured = evaluate(target, drafter, rows, trees(candidates)).trees
        table.add_row(name, *(f"{each.length:.2f}" for each in measured))
        results.extend({"text": text, **restricted, **dataclasses.asdict(each)} for each in measured)

    for candidates in CANDIDATES:
        name = f"{candidates} candidates per frame" + " (default)" * (candidates == DEFAULT)
        add(name, drafter, candidates, {"candidates": candidates})
    with tempfile.TemporaryDirectory() as folder:
        for size, fewer in with_fewer_tokens(drafter, Path(folder)):
            add(f"{size} tokens drafted", str(fewer), DEFAULT, {"drafted": size})
    Console().print(table)
    return results


def with_fewer_tokens(path: str, folder: Path) -> Iterator[tuple[int, Path]]:
    """The drafter with half of its draft vocabulary, a quarter of it and so on, if it has one."""
    size = (check_drafter(path).draft_vocab_size or 0) // 2
    while size >= FEWEST_DRAFTED:
        drafter = load_drafter(path, torch.float32)
        drafter.draft_only(drafter.draft_vocab[:size])
        drafter.save_pretrained(folder / str(size))
        yield size, folder / str(size)
        size //= 2


if __name__ == "__main__":
    main()
