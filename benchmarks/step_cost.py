"""What one step costs at scale: a Llama shape with random weights, plain decoding against tree verification.

    .venv/bin/python benchmarks/step_cost.py [--nodes 32] [--context 512] [--json PATH]

Random weights accept almost nothing, so a step's work is forced: every walk accepts a fixed path that is not a
prefix of the nodes, so that keys and values move as they do when real text is accepted. The two engines take
turns, so that the machine's moods hit both; the figure that counts is their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.training.target import drafter_config

FORCED_PATH = 3
"""Accepted nodes of a step; acceptance length 4."""

SHAPES = {
    "0.5B": {"hidden_size": 1280, "intermediate_size": 3840, "num_hidden_layers": 24, "num_attention_heads": 20},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@dataclass(frozen=True)
class StepCost:
    """Milliseconds, medians over rounds."""

    plain: float
    tree: float
    ratio: float
    """Median over rounds of tree / plain."""
    parts: dict[str, float]
    floor: float
    """The target's matrix products for all rows of the tree / for one row per request: the processor's own limit."""


def build_models(shape: str, folder: Path) -> tuple[Path, Path]:
    """A target and a drafter with random weights, bf16."""
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=32000,
        num_key_value_heads=SHAPES[shape]["num_attention_heads"] // 4,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "target")
    CTCDrafter(drafter_config(config)).to(torch.bfloat16).save_pretrained(folder / "drafter")
    return folder / "target", folder / "drafter"


def force_acceptance_and_time(worker: Any) -> None:
    """Runs in the worker: fixed acceptance, and a clock around each stage."""
    runner = worker.model_runner
    proposer = runner.drafter
    runner.clock = {}

    def timed(owner: Any, name: str, stage: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                runner.clock.setdefault(stage, []).append(time.perf_counter() - started)

        setattr(owner, name, outer)

    walk = runner.walker

    def forced(logits: Any, trees: Any, *rest: Any) -> Any:
        walked = walk(logits, trees, *rest)
        paths = [_forced_path(tree) for tree in trees]
        width = 1 + max(len(path) for path in paths)
        tokens = torch.full((len(trees), width), -1, dtype=torch.int32)
        for row, (tree, path) in enumerate(zip(trees, paths)):
            tokens[row, : len(path) + 1] = torch.tensor([*(tree.tokens[node - 1] for node in path), 7])
        sampled = type(walked.sampler_output)(sampled_token_ids=tokens, logprobs_tensors=None)
        return type(walked)(sampled, paths)

    runner.walker = forced
    timed(runner, "walker", "walk")
    timed(runner, "_move_accepted", "K/V move")
    timed(runner, "_model_forward", "target")
    timed(proposer, "propose", "draft and build")
    timed(proposer, "_trees", "build")


def _forced_path(tree: Any) -> list[int]:
    """The deepest late branch, cut at FORCED_PATH: its nodes are not the first ones, so all of them move."""
    best: list[int] = []
    for node in range(len(tree.tokens), 0, -1):
        path = []
        while node:
            path.append(node)
            node = tree.parents[node - 1]
        if len(path) >= FORCED_PATH:
            return path[::-1][:FORCED_PATH]
        best = max(best, path[::-1], key=len)
    return best


def count_walks(worker: Any) -> int:
    """Steps since the last call, the prefill included."""
    runner = worker.model_runner
    runner.num_counted, before = len(runner.clock["walk"]), getattr(runner, "num_counted", 0)
    return runner.num_counted - before


def read_clock(worker: Any) -> dict[str, float]:
    """Median milliseconds of each stage."""
    return {stage: 1e3 * statistics.median(times) for stage, times in worker.model_runner.clock.items()}


def gemm_floor(worker: Any, num_rows: int) -> float:
    """Milliseconds of the target's matrix products alone, with vLLM's own kernel, at `num_rows` rows."""
    layers = [module for module in worker.model_runner.model.modules() if hasattr(module, "cpu_linear")]
    inputs = {size: torch.randn(num_rows, size).bfloat16() for size in {layer.input_size for layer in layers}}
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for layer in layers:
            layer.cpu_linear(inputs[layer.input_size], layer.weight, None)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def engine_options(drafter: Path | None, num_nodes: int, context: int, batch: int, tree: str) -> dict[str, Any]:
    spec = None
    if drafter is not None:
        spec = {"method": "ctc", "model": str(drafter), "num_speculative_tokens": num_nodes, "tree": tree}
    return {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": context + 512,
        "max_num_seqs": batch,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "speculative_config": spec,
    }


def step_ms(llm: Any, context: int, batch: int, num_tokens: int) -> float:
    """Milliseconds of a decode step: the time between the first token and the last, over the steps between.

    A tree step is counted by the clock in its worker, because short trees cut the forced path short.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [(11 * i + row) % 31000 for i in range(context)]} for row in range(batch)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    first = max(output.metrics.first_token_ts for output in outputs)
    last = max(output.metrics.last_token_ts for output in outputs)
    num_steps = num_tokens - 1
    if llm.llm_engine.vllm_config.speculative_config is not None:
        [num_walks] = llm.collective_rpc(count_walks)
        num_steps = num_walks - 1
    return 1e3 * (last - first) / num_steps


def measure(shape: str, num_nodes: int, context: int, batch: int, rounds: int, tree: str) -> StepCost:
    from vllm_ctc_spec.engine.lifetime import TakingTurns

    with tempfile.TemporaryDirectory() as folder, TakingTurns() as engines:
        target, drafter = build_models(shape, Path(folder))
        plain = engines.start(str(target), **engine_options(None, num_nodes, context, batch, tree))
        trees = engines.start(str(target), **engine_options(drafter, num_nodes, context, batch, tree))
        trees.collective_rpc(force_acceptance_and_time)

        def step(llm: Any) -> float:
            return engines.turn(llm, lambda llm: step_ms(llm, context, batch, 33))

        for llm in (plain, trees):
            step(llm)
        pairs = [(step(plain), step(trees)) for _ in range(rounds)]
        [parts] = trees.collective_rpc(read_clock)
        one_row, all_rows = (
            engines.turn(plain, lambda llm, rows=rows: llm.collective_rpc(gemm_floor, args=(rows,))[0])
            for rows in (batch, batch * (num_nodes + 1))
        )
    parts["draft"] = parts.pop("draft and build") - parts["build"]
    return StepCost(
        plain=statistics.median(pair[0] for pair in pairs),
        tree=statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(with_tree / without for without, with_tree in pairs),
        parts=parts,
        floor=all_rows / one_row,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tree", default="prefix")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cost = measure(options.shape, options.nodes, options.context, options.batch, options.rounds, options.tree)
    title = f"{options.shape}, bf16, batch {options.batch}, context {options.context}, {options.nodes} nodes"
    table = Table("part", "ms", title=title)
    table.add_row("plain decode step", f"{cost.plain:.1f}")
    table.add_row("tree step, drafting included", f"{cost.tree:.1f}")
    for part in ("target", "walk", "K/V move", "draft", "build"):
        table.add_row(f"  {part}", f"{cost.parts[part]:.2f}")
    Console().print(table)
    print(f"tree step / plain step: {cost.ratio:.2f}")
    print(f"of which this processor's matrix products alone, {options.nodes + 1} rows against 1: {cost.floor:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(vars(cost), indent=2) + "\n")


if __name__ == "__main__":
    main()
