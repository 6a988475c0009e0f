"""Measures the cost of a step on a CPU: plain vLLM, and vLLM with trees. Llama shapes with random weights.

    .venv/bin/python -m benchmarks.cpu.step_cost RESULTS.jsonl [--markdown PATH] [--png PATH]
    .venv/bin/python -m benchmarks.cpu.step_cost RESULTS.jsonl --shapes 0.5B --contexts 512 --batches 1 --nodes 32

The first command measures the whole grid, the second one cell: a shape, context, batch and number of nodes verified per
request. RESULTS.jsonl gets one line per cell. Measured cells are skipped and failed ones measured again, so a grid can
be measured in several runs. The speed-up at acceptance length beta is beta / ratio. `benchmarks.gpu.step_cost` is the
command for a GPU; it needs no vLLM.

One plain engine and one with trees run all cells of a shape. They take turns in rounds, so that a slow minute affects
both. The result is the median of the rounds' ratios.

With random weights almost nothing would be accepted. So all trees are given the same shape, and each walk accepts three
nodes that are not the first ones, so that keys and values move as with real text.

The requests of a batch share their context through vLLM's prefix cache and differ in a short tail, because most of the
time would otherwise be prefill. The context is therefore in memory only once, and more of it may be in the processor's
caches than with distinct contexts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.cpu.step_cost_results import (
    Cell,
    Cost,
    Failure,
    Group,
    append_result,
    draw,
    markdown,
    read_results,
)
from benchmarks.cpu.step_cost_worker import (
    FORCED_PATH,
    force_acceptance,
    gemm_ms,
    read_clock,
    set_nodes,
    start_clock,
)
from benchmarks.shapes import SHAPES
from vllm_ctc_spec.config import MAX_NODES
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.training.models import drafter_config

BLOCK_SIZE = 128
TAIL = 8
"""Tokens of a prompt that only this request has."""


class CellFailed(Exception):
    """A cell could not be measured; the cause is the error. `nodes` is 0 for plain decoding."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes


@contextmanager
def blaming(nodes: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CellFailed(nodes) from error


Round = dict[int, tuple[float, dict[str, float]]]
"""By number of nodes, with 0 for plain decoding: milliseconds of a step, and of its stages."""


def build_models(shape: str, dtype: torch.dtype, folder: Path) -> tuple[Path, Path]:
    """Folders of a target and a drafter with random weights."""
    sizes = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_size,
        vocab_size=sizes.vocab_size,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / "target")
    CTCDrafter(drafter_config(config)).to(dtype).save_pretrained(folder / "drafter")
    return folder / "target", folder / "drafter"


def engine_options(drafter: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    spec = None
    if drafter is not None:
        nodes = {"num_speculative_tokens": max(options.nodes), "adaptive_budget": False}
        spec = {"method": "ctc", "model": str(drafter), **nodes}
    batch = max(options.batches)
    return {
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "block_size": BLOCK_SIZE,
        "max_model_len": max(options.contexts) + TAIL + options.tokens + 2 * (1 + MAX_NODES),
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(2048, batch * (1 + max(options.nodes))),
        "kv_cache_memory_bytes": 1 << 30,
        "speculative_config": spec,
    }


class Pair:
    """The two engines of a shape: plain vLLM, and vLLM with trees."""

    def __init__(self, engines: Any, plain: Any, trees: Any, tokens: int) -> None:
        self._engines, self._plain, self._trees, self._tokens = engines, plain, trees, tokens
        self._gemm_ms: dict[int, float] = {}
        for llm in (plain, trees):
            engines.turn(llm, lambda llm: llm.collective_rpc(start_clock))
        engines.turn(trees, lambda llm: llm.collective_rpc(force_acceptance))

    def measure(self, group: Group, node_counts: list[int], rounds: int) -> dict[int, Cost]:
        """Raises CellFailed."""
        with blaming(0):
            for llm in (self._plain, self._trees):
                self._engines.turn(llm, lambda llm: _generate(llm, group.context, 1, 1))
        # The first round warms up every number of rows and does not count.
        passes = [self._round(group, node_counts) for _ in range(1 + rounds)][1:]
        costs = {}
        for nodes in node_counts:
            with blaming(nodes):
                costs[nodes] = self._cost(group, nodes, passes)
        return costs

    def _round(self, group: Group, node_counts: list[int]) -> Round:
        steps = {}
        for nodes in (0, *node_counts):
            with blaming(nodes):
                steps[nodes] = self._step(group, nodes)
        return steps

    def _cost(self, group: Group, nodes: int, passes: list[Round]) -> Cost:
        names = passes[0][nodes][1]
        parts = {name: statistics.median(each[nodes][1][name] for each in passes) for name in names}
        parts["draft"] = parts.pop("draft and build") - parts["build"]
        return Cost(
            plain=statistics.median(each[0][0] for each in passes),
            tree=statistics.median(each[nodes][0] for each in passes),
            ratio=statistics.median(each[nodes][0] / each[0][0] for each in passes),
            parts=parts,
            floor=self._gemm(group.batch * (1 + nodes)) / self._gemm(group.batch),
        )

    def _step(self, group: Group, nodes: int) -> tuple[float, dict[str, float]]:
        """Milliseconds of a step, and of its stages."""

        def work(llm: Any) -> Any:
            if nodes:
                llm.collective_rpc(set_nodes, args=(nodes,))
            _generate(llm, group.context, group.batch, self._tokens)
            return llm.collective_rpc(read_clock, args=(group.batch, nodes))[0]

        return self._engines.turn(self._trees if nodes else self._plain, work)

    def _gemm(self, num_rows: int) -> float:
        if num_rows not in self._gemm_ms:
            [self._gemm_ms[num_rows]] = self._engines.turn(
                self._plain, lambda llm: llm.collective_rpc(gemm_ms, args=(num_rows,))
            )
        return self._gemm_ms[num_rows]


def _generate(llm: Any, context: int, batch: int, tokens: int) -> None:
    from vllm import SamplingParams

    shared = [11 * position % 31000 for position in range(context)]
    prompts = [
        {"prompt_token_ids": [*shared, *range(1000 + TAIL * row, 1000 + TAIL * (row + 1))]} for row in range(batch)
    ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.generate(prompts, params, use_tqdm=False)


@contextmanager
def started_pair(models: tuple[Path, Path], options: argparse.Namespace) -> Iterator[Pair]:
    from vllm_ctc_spec.engine.lifetime import TakingTurns

    target, drafter = models
    with TakingTurns() as engines:
        plain, trees = (engines.start(str(target), **engine_options(each, options)) for each in (None, drafter))
        yield Pair(engines, plain, trees, options.tokens)


def missing_groups(options: argparse.Namespace, shape: str) -> list[tuple[Group, list[int]]]:
    """Groups of the grid with their node counts that have no result yet."""
    results = read_results(options.results)
    groups = []
    for context, batch in product(options.contexts, options.batches):
        group = Group(shape, options.dtype, context, batch)
        nodes = [nodes for nodes in options.nodes if not isinstance(results.get(Cell(group, nodes)), Cost)]
        if nodes:
            groups.append((group, nodes))
    return groups


def measure_shape(shape: str, options: argparse.Namespace) -> None:
    """Each pass of the outer loop uses one pair of engines. After a failed cell, which may have ended an engine, a new
    pair is started."""
    todo = missing_groups(options, shape)
    with tempfile.TemporaryDirectory() as folder:
        models = build_models(shape, getattr(torch, options.dtype), Path(folder)) if todo else None
        while models and todo:
            try:
                with started_pair(models, options) as pair:
                    while todo:
                        group, nodes = todo[0]
                        costs = pair.measure(group, nodes, options.rounds)
                        for each, cost in costs.items():
                            record(options, Cell(group, each), cost)
                        todo.pop(0)
            except CellFailed as failed:
                group, nodes = todo.pop(0)
                lost = [failed.nodes] if failed.nodes else nodes
                for each in lost:
                    record(options, Cell(group, each), Failure(repr(failed.__cause__)))
                if kept := [each for each in nodes if each not in lost]:
                    todo.insert(0, (group, kept))
            except Exception as error:
                # The engines did not start, so no cell of this shape can be measured.
                for group, nodes in todo:
                    for each in nodes:
                        record(options, Cell(group, each), Failure(repr(error)))
                return


def record(options: argparse.Namespace, cell: Cell, result: Cost | Failure) -> None:
    append_result(options.results, cell, result)
    group = cell.group
    what = result.error if isinstance(result, Failure) else f"{result.tree:.1f} ms, {result.ratio:.2f} of plain"
    print(f"{group.shape}, context {group.context}, batch {group.batch}, {cell.nodes} nodes: {what}", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON lines, one per cell")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5B", "1B"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default %(default)s)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument(
        "--nodes", nargs="+", type=int, default=[4, 8, 16, 32, 63], help="plain decoding is always there"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--tokens", type=int, default=21, help="of each answer in a round (default %(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the tables that are printed at the end")
    parser.add_argument("--png", type=Path, help="draw step cost over nodes")
    parser.add_argument("--png-context", type=int, default=1024, help="at this context (default %(default)s)")
    options = parser.parse_args()
    for context in options.contexts:
        if context < BLOCK_SIZE or context % BLOCK_SIZE:
            parser.error(f"--contexts {context}: requests share whole blocks of {BLOCK_SIZE}; use a multiple of it.")
    for nodes in options.nodes:
        if not FORCED_PATH < nodes <= MAX_NODES:
            parser.error(
                f"--nodes {nodes}: a tree that holds the path and is no chain has 4 to {MAX_NODES}; 0 is always there."
            )
    return options


def main() -> None:
    options = parse_options()
    for shape in options.shapes:
        measure_shape(shape, options)
    chosen = {
        cell: result
        for cell, result in read_results(options.results).items()
        if cell.group.shape in options.shapes
        and cell.group.dtype == options.dtype
        and cell.group.context in options.contexts
        and cell.group.batch in options.batches
        and cell.nodes in options.nodes
    }
    tables = markdown(chosen)
    print(tables)
    if options.markdown is not None:
        options.markdown.write_text(tables)
    if options.png is not None:
        draw(chosen, options.png_context, options.png)


if __name__ == "__main__":
    main()
