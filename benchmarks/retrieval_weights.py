"""Plots the weight of the drafter over an answer, of engines with retrieval (docs/retrieval.md).

    .venv/bin/python -m benchmarks.retrieval_weights TARGET DRAFTER benchmarks/prompts/rewriting.jsonl OUT.png

A node budget that does not adapt, so that the drafter is asked in every step. Where nothing was found its weight is 1.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def record_weights(worker: Any) -> None:
    runner = worker.model_runner
    retrieval, runner.recorded_weights = runner.retrieval, []
    join = retrieval.join

    def recording(requests: Any, drafted: Any) -> Any:
        trees = join(requests, drafted)
        for request in requests:
            state = retrieval.states[request.req_id]
            weight = retrieval.weights.weight(state.match, state.evidence) if state.match else 1.0
            place = len(request.output_token_ids)
            runner.recorded_weights.append((place, weight, state.match))
        return trees

    retrieval.join = recording


def take_weights(worker: Any) -> list[tuple[int, float, int]]:
    """Of each step since the last call: tokens of the answer so far, weight of the drafter, length of the match."""
    runner = worker.model_runner
    taken, runner.recorded_weights[:] = list(runner.recorded_weights), []
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("prompts", type=Path, help="JSONL with turns; the first of each is asked")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 20], help="numbers of the lines, from 1")
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()]

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.lifetime import started
    from vllm_ctc_spec.engine.retrieval import LONGEST_MATCH
    from vllm_ctc_spec.kv_cache import kv_cache_options

    spec = {"method": "ctc", "model": options.drafter, "retrieval": "request", "adaptive_budget": False}
    cache = kv_cache_options(options.target, num_requests=1, max_model_len=2048)
    figure, axes = plt.subplots(len(options.rows), 1, figsize=(8, 2.2 * len(options.rows)), squeeze=False)
    with started(options.target, speculative_config=spec, **cache) as llm:
        llm.collective_rpc(record_weights)
        params = SamplingParams(temperature=0, max_tokens=options.max_tokens)
        for axis, row in zip(axes[:, 0], options.rows):
            line = lines[row - 1]
            llm.chat([{"role": "user", "content": line["turns"][0]}], params, use_tqdm=False)
            [steps] = llm.collective_rpc(take_weights)
            places, weights, matches = zip(*steps)
            axis.step(places, weights, where="post", label="weight of the drafter")
            axis.step(
                places,
                [match / LONGEST_MATCH for match in matches],
                where="post",
                alpha=0.4,
                label=f"length of the match / {LONGEST_MATCH}",
            )
            axis.set(ylim=(-0.05, 1.05), title=line["turns"][0].splitlines()[0][:80])
    axes[0, 0].legend(loc="center right")
    axes[-1, 0].set_xlabel("tokens of the answer")
    figure.tight_layout()
    figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
