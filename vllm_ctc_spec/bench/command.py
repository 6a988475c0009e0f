"""`vllm-ctc-spec bench`: reads a YAML and writes a folder with results.json, report.md and plots."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ctc_spec.command_line import add_trust_remote_code

if TYPE_CHECKING:
    from vllm_ctc_spec.bench.cells import Report
    from vllm_ctc_spec.bench.run import Bench


def add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure plain vLLM and speculative methods in turn, with intervals")
    bench.add_argument("config", type=Path, help="YAML; benchmarks/*.yaml explain the keys")
    bench.add_argument("output", type=Path, help="folder to write; a run that was killed resumes at its next cell")
    bench.add_argument("--preset", choices=("paper",), help="the setting of arXiv 2412.00061: batch 1, greedy")
    bench.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="measure only these methods and plain")
    bench.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", action="extend",
        help="replace a value of the YAML: folder=PATH, methods.ngram.num_speculative_tokens=3",
    )  # fmt: skip
    add_trust_remote_code(bench)
    bench.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    for package in ("yaml", "scipy", "matplotlib", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'bench needs the package {package}: pip install "vllm-ctc-spec[cpu,bench]".')
    # Checking the settings imports vLLM, whose log lines would break the progress bar.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_ctc_spec.bench.config import load_config
    from vllm_ctc_spec.bench.report import draw, render, to_terminal
    from vllm_ctc_spec.bench.run import Bench
    from vllm_ctc_spec.files import write_atomically
    from vllm_ctc_spec.tables import console

    config = load_config(options.config, options.set, options.only, options.preset)
    if options.trust_remote_code:
        config = dataclasses.replace(config, engine={**config.engine, "trust_remote_code": True})
    bench = Bench(config, options.output)
    results = _with_bar(bench) if sys.stdout.isatty() else bench.run(one_line_per_stage())
    plots = draw(results, options.output)
    write_atomically(options.output / "report.md", render(results, plots).encode())
    console().print(to_terminal(results))
    console().print(f"written: {options.output / 'report.md'}, results.json, {', '.join(plots)}")
    return 0


def one_line_per_stage() -> Report:
    """Progress without a terminal: a line for each engine start and each cell, with the minutes so far."""
    started, last = time.monotonic(), ""

    def report(title: str, done: int) -> None:
        nonlocal last
        stage = title.partition(": ")[0]
        if stage != last:
            print(f"{(time.monotonic() - started) / 60:.1f} min: {stage}", flush=True)
        last = stage

    return report


def _with_bar(bench: Bench) -> dict[str, Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # Once a second, because drawing takes processor time from the engine that is measured.
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task("", total=len(bench.pending()) * bench.num_passes())
        results = bench.run(lambda title, done: progress.update(task, description=title, advance=done))
        # A method that failed leaves passes undone.
        progress.update(task, description="measured", completed=progress.tasks[task].total)
    return results
