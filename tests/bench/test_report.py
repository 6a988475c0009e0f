from __future__ import annotations

import dataclasses
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.samples import BROKEN, EXACT, plain_pass, tree_pass
from vllm_ctc_spec.bench.cells import summarize
from vllm_ctc_spec.bench.report import draw, render, to_terminal
from vllm_ctc_spec.bench.worker_extension import STAGES

PLAIN, TREES = [plain_pass(2.0), plain_pass(4.1)], [tree_pass(1.0), tree_pass(2.0)]


def method(passes: Any, equality: Any, stages: dict[str, float] | None, is_eager: bool = False) -> dict[str, Any]:
    engine = {"dtype": "float32", "max_model_len": 512, "is_eager": is_eager}
    return dataclasses.asdict(summarize(["a", "b"], PLAIN, passes, equality, 3 << 20, stages)) | {"engine": engine}


def cell(batch_size: int) -> dict[str, Any]:
    return {
        "prompts": "code",
        "batch_size": batch_size,
        "sampling": {"temperature": 0.2, "top_p": 0.9},
        "prompt_names": ["first", "second"],
        "load_average": 0.5,
        "methods": {
            "plain": method(PLAIN, EXACT, None),
            "ctc": method(TREES, EXACT, dict.fromkeys(STAGES, 1.25)),
            "ngram": method(TREES, BROKEN, None, is_eager=True),
        },
        "errors": {"medusa": "ValueError: no such head"},
    }


def results() -> dict[str, Any]:
    machine = {"cpu": "A CPU", "num_cores": 2, "memory_gib": 8, "gpu": None, "versions": {"vllm": "0.32.0"}}
    config = {"target": "the/target", "rounds": 2, "max_tokens": 9, "seed": 0}
    return {"date": "2026-01-01", "machine": machine, "config": config, "cells": [cell(1), cell(4)]}


def row(report: str, name: str) -> list[str]:
    line = next(line for line in report.splitlines() if line.startswith(f"| {name} |"))
    return [part.strip() for part in line.strip("|").split("|")]


def test_the_report_shows_every_figure_and_every_failure():
    report = render(results(), ["ratio.png"])
    assert "A CPU, 2 cores, 8 GiB; vllm 0.32.0" in report
    assert "## code, batch 4, temperature 0.2, top-p 0.9" in report
    ctc = row(report, "ctc")
    assert ctc[1] == "24.0"
    assert ctc[2] == "2.025"
    assert ctc[4:8] == ["3.00", "4.00", "3.00", "8.0"]
    assert ctc[10:] == ["3", "2", "0", "0", "true"]
    assert row(report, "plain")[2] == "1"
    assert row(report, "ngram")[-1] == "**false**"
    assert "* ngram: prompt second, token 4, gap 2.500 (20.0 steps), **different**" in report
    assert "* medusa: ValueError: no such head" in report
    assert "Without compilation (`enforce_eager`): ngram." in report
    assert "| ctc | 1.25 | 1.25 | 1.25 | 1.25 | 1.25 |" in report
    assert "| ctc | 2.00 / 4.00 | 4.00 / 4.00 |" in report
    assert "![ratio](ratio.png)" in report


def test_the_terminal_names_what_was_not_measured():
    written = StringIO()
    Console(width=160, file=written).print(to_terminal(results()))
    text = written.getvalue()
    assert "medusa" in text and "not measured" in text and "2.025" in text
    ngram = next(line for line in text.splitlines() if "ngram" in line)
    assert [part.strip() for part in ngram.split("│")[7:-1]] == ["1", "0", "1", "false"]


def test_plots_are_written_for_one_method_and_for_none(tmp_path: Path):
    assert draw(results(), tmp_path) == ["ratio.png", "beta.png", "depth.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("ratio.png", "beta.png", "depth.png"))
    alone = results()
    for each in alone["cells"]:
        each["methods"] = {"plain": each["methods"]["plain"]}
    draw(alone, tmp_path)
    assert "| plain |" in render(alone, [])
