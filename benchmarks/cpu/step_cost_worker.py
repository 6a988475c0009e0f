"""The part of `benchmarks.cpu.step_cost` in vLLM's worker: a clock, and a fixed result of every walk."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

FORCED_PATH = 3
"""Accepted nodes of a step; acceptance length 4."""


@dataclass
class Step:
    started: float
    rows: list[int]
    """Number of rows of each request."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds"""


class StepClock:
    """Records when each step began and how long its stages took."""

    def __init__(self, runner: Any) -> None:
        self.steps: list[Step] = []
        self._is_drafting = False
        execute = runner.execute_model

        def outer(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            self.steps.append(Step(time.perf_counter(), list(scheduled.num_scheduled_tokens.values())))
            return execute(scheduled, *args, **kwargs)

        runner.execute_model = outer

    def time(self, owner: Any, name: str, stage: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            # The drafter calls the target's LM head too; that time belongs to drafting.
            if stage == "target" and self._is_drafting:
                return inner(*args, **kwargs)
            self._is_drafting = stage == "draft and build" or self._is_drafting
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                stages = self.steps[-1].stages
                stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - started
                self._is_drafting = self._is_drafting and stage != "draft and build"

        setattr(owner, name, outer)


def start_clock(worker: Any) -> None:
    worker.model_runner.clock = StepClock(worker.model_runner)


def force_acceptance(worker: Any) -> None:
    """Gives all trees one shape, lets every walk accept the same path, and times each stage."""
    runner, proposer = worker.model_runner, worker.model_runner.drafter
    walk, propose = runner.walker, proposer.propose

    def forced(logits: Any, trees: Any, *rest: Any) -> Any:
        walked = walk(logits, trees, *rest)
        paths = [[len(tree.tokens) - FORCED_PATH + 1 + level for level in range(FORCED_PATH)] for tree in trees]
        paths = [path if tree.tokens else [] for path, tree in zip(paths, trees)]
        tokens = torch.full((len(trees), 1 + FORCED_PATH), -1, dtype=torch.int32)
        for row, (tree, path) in enumerate(zip(trees, paths)):
            tokens[row, : len(path) + 1] = torch.tensor([*(tree.tokens[node - 1] for node in path), 7])
        sampled = dataclasses.replace(walked.sampler_output, sampled_token_ids=tokens)
        return dataclasses.replace(walked, sampler_output=sampled, accepted_nodes=paths)

    def reshaped(*args: Any) -> Any:
        """All nodes are children of the anchor, except the last ones, which extend one of them to the path."""
        trees = []
        for tree in propose(*args):
            num_roots, below = len(tree.tokens) - FORCED_PATH + 1, range(1, FORCED_PATH)
            parents = [0] * num_roots + [num_roots + level - 1 for level in below]
            trees.append(dataclasses.replace(tree, parents=parents, depths=[1] * num_roots + [1 + n for n in below]))
        return trees

    runner.walker, proposer.propose = forced, reshaped
    runner.clock.time(runner, "_model_forward", "target")
    runner.clock.time(runner.model, "compute_logits", "target")
    runner.clock.time(runner, "walker", "walk")
    runner.clock.time(runner, "_move_accepted", "K/V move")
    runner.clock.time(proposer, "propose", "draft and build")
    runner.clock.time(proposer, "_build", "build")


def set_nodes(worker: Any, nodes: int) -> None:
    """Sets the node budget of the following steps."""
    proposer = worker.model_runner.drafter
    proposer.settings = dataclasses.replace(proposer.settings, num_nodes=nodes)


def read_clock(worker: Any, batch: int, nodes: int) -> tuple[float, dict[str, float]]:
    """Mean milliseconds of the steps since the last call in which all requests decode, and of their stages."""
    clock = worker.model_runner.clock
    steps, clock.steps = clock.steps, []
    # Requests arrive and finish one by one, so the first and last steps do not hold all of them.
    whole = [(step, after) for step, after in pairwise(steps) if step.rows == [1 + nodes] * batch]
    if not whole:
        raise RuntimeError(f"no step of {batch} requests with {nodes} nodes, but {[step.rows for step in steps]}")
    stages = {stage: 1e3 * statistics.fmean(step.stages[stage] for step, _ in whole) for stage in whole[0][0].stages}
    return 1e3 * statistics.fmean(after.started - step.started for step, after in whole), stages


def gemm_ms(worker: Any, num_rows: int) -> float:
    """Milliseconds of the target's matrix products alone, with vLLM's kernel, for `num_rows` rows."""
    layers = [module for module in worker.model_runner.model.modules() if hasattr(module, "cpu_linear")]
    dtype = worker.model_runner.dtype
    inputs = {size: torch.randn(num_rows, size, dtype=dtype) for size in {layer.input_size for layer in layers}}
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for layer in layers:
            layer.cpu_linear(inputs[layer.input_size], layer.weight, None)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)
