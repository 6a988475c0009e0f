"""Checks on a GPU that vLLM with trees generates the tokens of plain vLLM, and measures both, in two dtypes.

    python -m benchmarks.gpu.engine_check RESULTS [--target FOLDER --drafter FOLDER --prompts FILE.jsonl]

Without folders it builds the tests' tiny target and drafter (about a minute); their tokens count, their speed means
nothing. In float32 tokens must be equal, greedy and seeded; in bfloat16, greedy, equal up to near-ties of the top two
logits. `vllm-ctc-spec bench` runs the engines in turns: RESULTS gets a folder with its output for each dtype, and
engine_check.json with the verdicts.

Exit status: 1 if a token differs, an engine fails or nothing was accepted, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from tests.tiny_pair import build_tiny_pair
from vllm_ctc_spec.bench.config import BenchConfig, Method, PromptSource
from vllm_ctc_spec.bench.records import Sampling
from vllm_ctc_spec.bench.report import to_terminal
from vllm_ctc_spec.bench.run import Bench
from vllm_ctc_spec.tables import console

SAMPLING = {"float32": (Sampling(), Sampling(temperature=1.0)), "bfloat16": (Sampling(),)}
BATCHES = (1, 8)
CACHE_BYTES = 2 << 30
"""K/V cache of each engine; two engines are in memory at the same time."""


def bench_config(dtype: str, options: argparse.Namespace) -> BenchConfig:
    def ctc(num_nodes: int) -> dict[str, Any]:
        return {
            "method": "ctc",
            "model": str(options.drafter),
            "num_speculative_tokens": num_nodes,
            "adaptive_budget": False,
        }

    return BenchConfig(
        target=str(options.target),
        methods=(Method("plain", None, {}), *(Method(f"ctc-{nodes}", ctc(nodes), {}) for nodes in options.nodes)),
        prompts={"prompts": PromptSource(str(options.prompts))},
        engine={"dtype": dtype, "max_model_len": 1024, "kv_cache_memory_bytes": CACHE_BYTES},
        batch_sizes=BATCHES,
        sampling=SAMPLING[dtype],
        max_tokens=options.max_tokens,
        num_prompts=max(BATCHES),
        rounds=options.rounds,
    )


def verdicts(dtype: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per cell and method, with `ok`."""
    rows = []
    for cell in results["cells"]:
        where = {"dtype": dtype, "batch": cell["batch_size"], **cell["sampling"]}
        for name, method in cell["methods"].items():
            length = method["acceptance_length"]
            is_right = method["equality"]["exact"] and (name == "plain" or length > 1)
            rows.append({**where, "method": name, "acceptance_length": length, "ok": bool(is_right)})
        rows += [{**where, "method": name, "error": error, "ok": False} for name, error in cell["errors"].items()]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--prompts", type=Path, help="JSONL, as for `vllm-ctc-spec bench`")
    parser.add_argument("--dtypes", nargs="+", choices=list(SAMPLING), default=list(SAMPLING))
    parser.add_argument("--nodes", nargs="+", type=int, default=[32], help="node budgets")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    paths = options.target, options.drafter, options.prompts
    if any(paths) and not all(paths):
        parser.error("--target, --drafter and --prompts belong together")
    if not torch.cuda.is_available():
        print("engine_check: torch sees no CUDA device; run this on a machine with an NVIDIA GPU.", file=sys.stderr)
        return 2
    if not any(paths):
        pair = build_tiny_pair(options.results / "pair")
        options.target, options.drafter, options.prompts = pair.target, pair.drafter, pair.prompts
    found = {dtype: Bench(bench_config(dtype, options), options.results / dtype) for dtype in options.dtypes}
    results = {
        dtype: bench.run(lambda title, done: print(title) if not done else None) for dtype, bench in found.items()
    }
    checks = [row for dtype, each in results.items() for row in verdicts(dtype, each)]
    wrong = [row for row in checks if not row["ok"]]
    (options.results / "engine_check.json").write_text(json.dumps({"checks": checks, "results": results}, indent=1))
    for dtype, each in results.items():
        console().print(dtype, to_terminal(each))
    print(f"{torch.cuda.get_device_name()}: {len(checks) - len(wrong)} of {len(checks)} right", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
