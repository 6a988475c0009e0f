"""`vllm-ctc-spec demo`: build the pair, serve it with and without trees, show the difference."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.demo.build import DemoPaths, build_demo
from vllm_ctc_spec.inspection import draw, summary, to_terminal

if TYPE_CHECKING:
    from vllm import LLM

NUM_PROMPTS = 12
NUM_NEW_TOKENS = 96
NUM_ROUNDS = 3


@dataclass(frozen=True)
class Comparison:
    """Both engines on the same held-out prompts, one request at a time, greedy, float32, compiled mode."""

    identical: bool
    """Every answer has the same tokens."""
    acceptance_length: float
    tokens_per_second: dict[str, float]
    """Keys `plain` and `ctc`; the median round."""
    speedup: float
    """Median over rounds of ctc / plain, the two engines taking turns."""


def print_paths() -> int:
    paths = build_demo()
    print(paths.target)
    print(paths.drafter)
    return 0


def run_demo(num_nodes: int, json_path: Path | None) -> int:
    console = Console()
    paths = build_demo()
    prompts = _read_prompts(paths)
    console.print("[bold]Serving both[/]: plain vLLM, and vLLM with CTC trees (compiled mode; a minute to start)")
    comparison = compare(paths, prompts, num_nodes)
    _show(console, comparison, paths, prompts, num_nodes)
    if json_path is not None:
        json_path.write_text(json.dumps(dataclasses.asdict(comparison), indent=2) + "\n")
    return 0 if comparison.identical else 1


def compare(paths: DemoPaths, prompts: list[str], num_nodes: int) -> Comparison:
    """Start both engines and let them take turns, so that the machine's moods hit both."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm_ctc_spec.engine.lifetime import TakingTurns
    from vllm_ctc_spec.engine.metrics import read_tree_metrics

    with TakingTurns() as engines:
        plain = engines.start(str(paths.target), **_engine_options(paths, None))
        ctc = engines.start(str(paths.target), **_engine_options(paths, num_nodes))
        answers = [engines.turn(llm, lambda llm: _answers(llm, prompts)) for llm in (plain, ctc)]
        rounds = [
            [engines.turn(llm, lambda llm: _tokens_per_second(llm, prompts)) for llm in (plain, ctc)]
            for _ in range(NUM_ROUNDS)
        ]
        metrics = read_tree_metrics(ctc)
    assert metrics is not None
    return Comparison(
        identical=answers[0] == answers[1],
        acceptance_length=metrics.acceptance_length,
        tokens_per_second={name: _median(column) for name, column in zip(("plain", "ctc"), zip(*rounds))},
        speedup=_median([with_trees / without for without, with_trees in rounds]),
    )


def _engine_options(paths: DemoPaths, num_nodes: int | None) -> dict[str, Any]:
    spec = None
    if num_nodes is not None:
        spec = {"method": "ctc", "model": str(paths.drafter), "num_speculative_tokens": num_nodes}
    return {
        "dtype": "float32",
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 1 << 28,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "speculative_config": spec,
    }


def _answers(llm: LLM, prompts: list[str]) -> list[list[int]]:
    """Token ids, one request at a time."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    return [list(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids) for prompt in prompts]


def _tokens_per_second(llm: LLM, prompts: list[str]) -> float:
    started = time.perf_counter()
    num_tokens = sum(map(len, _answers(llm, prompts)))
    return num_tokens / (time.perf_counter() - started)


def _median(values: Any) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _read_prompts(paths: DemoPaths) -> list[str]:
    with paths.prompts.open(encoding="utf-8") as rows:
        return [json.loads(row)["prompt"] for row in rows][:NUM_PROMPTS]


def _show(console: Console, result: Comparison, paths: DemoPaths, prompts: list[str], num_nodes: int) -> None:
    drawn = draw(str(paths.target), str(paths.drafter), prompts[0], num_nodes, SpecOptions(), skip=2)
    console.print("\n[bold]One step's token tree[/] (prefix probabilities; green: what the target took)")
    console.print(to_terminal(drawn))
    console.print(summary(drawn))
    table = Table("", "tokens/s", "tokens per target step", title=f"{len(prompts)} held-out prompts, batch 1, greedy")
    speeds = result.tokens_per_second
    table.add_row("plain vLLM", f"{speeds['plain']:.0f}", "1.00")
    table.add_row(f"CTC trees, {num_nodes} nodes", f"{speeds['ctc']:.0f}", f"{result.acceptance_length:.2f}")
    console.print()
    console.print(table)
    verdict = "[green]the same tokens[/]" if result.identical else "[red]DIFFERENT TOKENS[/]"
    console.print(f"{verdict}, [bold]{result.speedup:.2f} x[/] as fast")
    console.print("\nServe the pair yourself:")
    console.print(f"  .venv/bin/vllm serve {paths.target} --spec-model {paths.drafter} --spec-tokens {num_nodes}")
