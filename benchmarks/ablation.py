"""Compares drafters after equal training time: emission families, slack, depth and trees, on one target.

    .venv/bin/python benchmarks/ablation.py TARGET WORK_FOLDER --questions QUESTIONS [--minutes 4] [--json PATH]
    .venv/bin/python benchmarks/ablation.py TARGET WORK_FOLDER --rows ROWS --unseen ROWS [--minutes 4] [--json PATH]

The target answers QUESTIONS greedily with plain vLLM; the last 150 are for the evaluation only. Or ROWS are what
`vllm-ctc-spec train regenerate` wrote. Then each drafter of the table is trained for the same time. With `--jobs`
several are trained at the same time, each on its share of the cores. They are judged by walking their trees along the
answers to the unseen questions. Results in WORK_FOLDER are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from rich.table import Table
from transformers import AutoTokenizer

from vllm_ctc_spec.tables import console
from vllm_ctc_spec.training.prompts import read_prompts
from vllm_ctc_spec.training.regenerate import RegenerateSettings, regenerate

NUM_UNSEEN = 150
NUM_VARIED = 4
"""Copies of each training question with other numbers in it. Greedy decoding has one answer to a prompt, and more
greedy text teaches more than text sampled at other temperatures."""

ENGINE = {"max_model_len": 1024, "enforce_eager": True, "gpu_memory_utilization": 0.3}
ENGINE_NODES = 32
NUM_SERVED = 50
"""Number of unseen prompts that the engine answers with each drafter."""

BUDGETS = (8, 16, 32, 63)


@dataclass(frozen=True)
class Variant:
    name: str
    options: str
    """Arguments of `vllm-ctc-spec train fit`."""
    trained: Path | None = None
    """Folder of a drafter that is already trained."""


VARIANTS = (
    Variant("cross-entropy heads", "--frames 8 --rank 0"),
    Variant("plain CTC", "--frames 8 --label-length 6 --emission independent"),
    Variant("conditioned, rank 128", "--frames 8 --rank 128"),
    Variant("conditioned, slack 1", "--frames 8 --rank 128 --label-length 7"),
    Variant("conditioned, slack 2", "--frames 8 --rank 128 --label-length 6"),
    Variant("conditioned, 12 frames", "--frames 12 --rank 128"),
    Variant("conditioned, two layers", "--frames 8 --rank 128 --layers 2"),
    Variant("conditioned, rank 256", "--frames 8 --rank 256"),
    Variant("the last hidden state alone", "--frames 8 --rank 256 --target-layers none"),
)


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    rows, unseen = (options.rows, options.unseen) if options.questions is None else _write_rows(options)
    chosen = [variant for variant in VARIANTS if options.only is None or variant.name in options.only]
    chosen += [Variant(str(folder), "", folder) for folder in options.trained]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda variant: _measure(variant, rows, unseen, options), chosen))
    for variant, result in zip(chosen, results, strict=True):
        result["engine"] = _engine_length(_drafter(variant, options), unseen, options)
    for table in (_acceptance_table(results), _detail_table(results)):
        console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.png is not None:
        _plot(results, options.png)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("work", type=Path, help="folder for rows, drafters and their evaluations")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--questions", help="JSONL with a `question` per line, put into the target's chat template")
    source.add_argument("--rows", type=Path, help="rows to train on; with --unseen")
    parser.add_argument("--unseen", type=Path, help="rows for the evaluation")
    parser.add_argument("--minutes", type=float, default=4, help="training time of each drafter (default %(default)s)")
    parser.add_argument("--fit", default="", help="further arguments of `train fit`, for all drafters, as one string")
    parser.add_argument("--jobs", type=int, default=1, help="drafters trained at the same time (default %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="only these drafters")
    parser.add_argument("--trained", nargs="+", type=Path, default=[], help="folders of further, trained drafters")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    if (options.rows is None) != (options.unseen is None):
        parser.error("--rows and --unseen need each other")
    return options


def _write_rows(options: argparse.Namespace) -> tuple[Path, Path]:
    rows, unseen = options.work / "rows.jsonl", options.work / "unseen.jsonl"
    with open(options.questions, encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file]
    varied = [_vary(question, copy) for copy in range(1 + NUM_VARIED) for question in questions[:-NUM_UNSEEN]]
    for path, chosen in ((unseen, questions[-NUM_UNSEEN:]), (rows, varied)):
        regenerate(options.target, _prompts(chosen, options), path, RegenerateSettings(), **ENGINE)
    return rows, unseen


def _vary(question: str, copy: int) -> str:
    """Copy 0 is the question itself. In others each number is replaced by a random one with as many digits."""
    if copy == 0:
        return question
    draw = random.Random(f"{copy} {question}")
    return re.sub(r"\d+", lambda number: str(draw.randrange(10 ** len(number[0])) or 1), question)


def _prompts(questions: list[str], options: argparse.Namespace) -> list[list[int]]:
    path = options.work / "prompts.jsonl"
    chats = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return read_prompts(path, AutoTokenizer.from_pretrained(options.target))


def _drafter(variant: Variant, options: argparse.Namespace) -> Path:
    if variant.trained is not None:
        return variant.trained
    name = "".join(letter if letter.isalnum() else "-" for letter in variant.name)
    return options.work / f"{name}-{options.minutes:g}"


def _engine_length(drafter: Path, unseen: Path, options: argparse.Namespace) -> float:
    """vLLM's mean acceptance length, greedy. Batching does not change it, because it changes no token."""
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started
    from vllm_ctc_spec.engine.metrics import read_tree_metrics

    prompts = [json.loads(line)["prompt_token_ids"] for line in unseen.open()][:NUM_SERVED]
    method = {"method": "ctc", "model": str(drafter), "num_speculative_tokens": ENGINE_NODES, "adaptive_budget": False}
    with started(options.target, speculative_config=method, disable_log_stats=False, **ENGINE) as llm:
        parameters = SamplingParams(temperature=0, max_tokens=256)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        metrics = read_tree_metrics(llm)
    assert metrics is not None
    return metrics.acceptance_length


def _measure(variant: Variant, rows: Path, unseen: Path, options: argparse.Namespace) -> dict[str, Any]:
    drafter = _drafter(variant, options)
    evaluation = drafter.with_name(f"{drafter.name}.json")
    train = [sys.executable, "-m", "vllm_ctc_spec.cli", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}
    if not drafter.exists():
        budget = ["--steps", "1000000", "--minutes", str(options.minutes)]
        fit = [
            *train,
            "fit",
            options.target,
            str(rows),
            str(drafter),
            *budget,
            *variant.options.split(),
            *options.fit.split(),
        ]
        subprocess.run(fit, check=True, env=environment, stdout=subprocess.DEVNULL)
    if not evaluation.exists():
        evaluate = [*train, "evaluate", options.target, str(drafter), str(unseen), "--paper", "--json", str(evaluation)]
        subprocess.run(evaluate, check=True, env=environment, stdout=subprocess.DEVNULL)
    training = json.loads((drafter / "training.json").read_text())
    return {"name": variant.name, "training": training, "evaluation": json.loads(evaluation.read_text())}


def _lengths(result: dict[str, Any], tree: str) -> dict[int, float]:
    return {
        each["num_nodes"]: each["length"] for each in result["evaluation"]["trees"] if each["options"]["tree"] == tree
    }


def _acceptance_table(results: list[dict[str, Any]]) -> Table:
    columns = ("drafter", "steps", "chain", *(f"{nodes} nodes" for nodes in BUDGETS), "paper's tree, 63", "engine, 32")
    table = Table(*columns, title="acceptance length")
    for result in results:
        chain, template, prefix = (_lengths(result, tree) for tree in ("chain", "template", "prefix"))
        values = [*chain.values(), *(prefix[nodes] for nodes in BUDGETS), *template.values(), result["engine"]]
        table.add_row(result["name"], str(result["training"]["steps"]), *(f"{value:.2f}" for value in values))
    return table


def _detail_table(results: list[dict[str, Any]]) -> Table:
    table = Table("drafter", "right after first choice", "after sibling", "expected / accepted, 63 nodes", "loss")
    for result in results:
        evaluation = result["evaluation"]
        ratios = [tree["expected_over_accepted"] for tree in evaluation["trees"] if tree["num_nodes"] == max(BUDGETS)]
        shares = [evaluation[name]["share"] for name in ("after_first_choice", "after_sibling")]
        values = [*shares, ratios[0], result["training"]["losses"][-1]]
        table.add_row(result["name"], *(f"{value:.2f}" for value in values))
    return table


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for result in results:
        prefix = _lengths(result, "prefix")
        (line,) = axes.plot(BUDGETS, [prefix[nodes] for nodes in BUDGETS], marker="o", label=result["name"])
        axes.axhline(*_lengths(result, "chain").values(), color=line.get_color(), linestyle=":", linewidth=0.8)
        axes.plot(max(BUDGETS), *_lengths(result, "template").values(), marker="x", color=line.get_color())
    axes.set(xlabel="node budget", ylabel="acceptance length", xticks=BUDGETS)
    axes.set_title("prefix trees (lines), chain of the same drafter (dotted), the paper's tree (crosses)")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
