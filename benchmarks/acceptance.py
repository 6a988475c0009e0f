"""Acceptance length of the demo's drafter on held-out prompts, and what each approximation of the tree costs.

    .venv/bin/python benchmarks/acceptance.py [--json PATH]

The target first continues the held-out prompts with plain vLLM, greedily and at temperature 0.8; then trees for
random anchors are walked along that text (vllm_ctc_spec/training/evaluate.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from vllm_ctc_spec.algorithm import emissions
from vllm_ctc_spec.config import MAX_FRAMES, SpecOptions
from vllm_ctc_spec.demo.build import DemoPaths, build_demo
from vllm_ctc_spec.training.data import read_prompts
from vllm_ctc_spec.training.evaluate import TreeChoice, evaluate
from vllm_ctc_spec.training.regenerate import RegenerateSettings, regenerate

BUDGETS = (4, 8, 12, 16, 32, 63)
TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True)
class Setting:
    name: str
    candidates: int
    restricted: bool
    """Normalise as for vocabularies too large for the exact sum, with as small a share of the vocabulary."""


SETTINGS = (
    Setting("2 candidates per frame", 2, False),
    Setting("4 candidates per frame (default)", 4, False),
    Setting("8 candidates per frame", 8, False),
    Setting("4, normaliser restricted to 32 tokens", 4, True),
)


@contextmanager
def normaliser(restricted: bool) -> Iterator[None]:
    before = emissions.EXACT_NORMALISER_MAX_VOCABULARY, emissions.NORMALISER_SUPPORT
    if restricted:
        emissions.EXACT_NORMALISER_MAX_VOCABULARY, emissions.NORMALISER_SUPPORT = 0, 32
    try:
        yield
    finally:
        emissions.EXACT_NORMALISER_MAX_VOCABULARY, emissions.NORMALISER_SUPPORT = before


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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    paths = build_demo()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for temperature, rows in held_out_rows(paths, Path(folder)).items():
            table = Table("", "chain", *map(str, BUDGETS), title=f"acceptance length, temperature {temperature}")
            for setting in SETTINGS:
                with normaliser(setting.restricted):
                    measured = evaluate(str(paths.target), str(paths.drafter), rows, trees(setting.candidates)).trees
                table.add_row(setting.name, *(f"{each.length:.2f}" for each in measured))
                results += [
                    {"temperature": temperature, "setting": setting.name, **dataclasses.asdict(each)}
                    for each in measured
                ]
            Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
