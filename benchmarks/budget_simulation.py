"""Compares the adaptive budget with the best fixed number of nodes, on synthetic machines.

    .venv/bin/python benchmarks/budget_simulation.py [--json FILE]

No engine runs and nothing is measured: a step's seconds come from a formula, accepted tokens from a random drafter. A
speed is the number of tokens over that of plain decoding in the same time at the same load. "speed", "fixed" and
"table" are of the steps after the first thousand. "table" is vLLM's table of draft lengths by batch size
(`num_speculative_tokens_per_batch_size`), tuned for the machine and the drafter.

Letters: R requests, N nodes of a tree, T frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from vllm_ctc_spec.engine.adaptive.budget import NodeBudget, StepOutcome
from vllm_ctc_spec.engine.adaptive.cost import drafting_sizes, measure, target_sizes

NUM_NODES, NUM_FRAMES = 32, 8
FIXED = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32)
NUM_STEPS, NUM_FIRST = 2000, 1000
ANSWER = 400
"""Tokens of each answer; another request follows it."""


@dataclass(frozen=True)
class Machine:
    """Times are relative to a plain step of one request without context, except `plain_seconds`."""

    name: str
    plain_seconds: float
    """Seconds of that step."""
    row: float
    """Cost of each further row."""
    tile: int = 1
    """Number of rows that are computed together."""
    free_rows: int = 1
    """Number of rows that cost nothing."""
    draft: float = 0.15
    """Cost of drafting for one request."""
    draft_request: float = 0.02
    """Cost of drafting for each further request."""
    overhead: float = 0.15
    """Cost of a step beside the target's pass; not measured at start-up."""
    row_overhead: float = 0.003
    """The same for each row."""
    attention: float = 0.0
    """Cost of attention to 1,000 positions, once per request."""
    row_attention: float = 0.0
    """The same, once per row."""
    contexts: tuple[int, int] = (100, 2000)
    """Shortest and longest prompt."""
    noise: float = 0.08
    """Standard deviation of a step's time; one in a hundred takes five times as long."""
    drift: float = 0.0
    """Amplitude of a sine of 1,500 steps that multiplies the time of a step."""

    def target(self, rows: Any) -> Any:
        """Seconds of the target's pass by rows, elementwise: the table that is measured at start-up."""
        tiles = np.ceil(np.maximum(rows - self.free_rows, 0) / self.tile) * self.tile
        return self.plain_seconds * (1 + self.row * tiles)

    def drafting(self, num_requests: Any) -> Any:
        return self.plain_seconds * (self.draft + self.draft_request * (num_requests - 1))

    def verifying(self, num_requests: Any, rows: Any, context: Any, row_context: Any) -> Any:
        """Seconds of a step without drafting. context, row_context: thousands of positions, summed over requests and
        over rows."""
        beside = self.overhead + self.row_overhead * rows
        attention = self.attention * context + self.row_attention * row_context
        return self.target(rows) + self.plain_seconds * (beside + attention)


@dataclass(frozen=True)
class Drafter:
    name: str
    level: float
    """Mean logit of the probability that the first draft token is right."""
    spread: float = 1.3
    """Standard deviation of that logit over requests and steps."""
    excess: float = 0.0
    """Reported logit minus true logit."""


GOOD = Drafter("good", 0.8)
FAIR = Drafter("fair", -0.4)
OVERCONFIDENT = Drafter("overconfident", -0.6, excess=1.5)
UNDERCONFIDENT = Drafter("underconfident", 0.8, excess=-1.0)
USELESS = Drafter("useless", -5.0, spread=0.3)
USELESS_OVERCONFIDENT = Drafter("useless and sure", -5.0, spread=1.0, excess=5.0)


@dataclass(frozen=True)
class Trees:
    """Trees of one drafter, for each logit of GRID."""

    reported: np.ndarray
    """[grid, N], the drafter's psi of each node, descending."""
    expected_length: np.ndarray
    """[grid, N + 1], the sum of psi over the first 0 .. N nodes."""
    accepted: np.ndarray
    """[grid, N + 1, T], probability that 1 .. T tokens or more are accepted if the first 0 .. N nodes are verified."""


GRID = np.linspace(-7, 5, 49)


@cache
def trees_of(excess: float, num_frames: int = NUM_FRAMES) -> Trees:
    reported, accepted = np.zeros((len(GRID), NUM_NODES)), np.zeros((len(GRID), NUM_NODES + 1, NUM_FRAMES))
    for index, logit in enumerate(GRID):
        for node, (psi, truth, depth) in enumerate(_best_tree(logit, excess, num_frames)):
            reported[index, node] = psi
            accepted[index, node + 1 :, depth - 1] += truth
    return Trees(reported, np.pad(reported.cumsum(1), ((0, 0), (1, 0))), accepted)


def _best_tree(logit: float, excess: float, num_frames: int) -> Iterator[tuple[float, float, int]]:
    """Reported psi, true psi and depth of the N nodes with the largest reported psi."""
    shares = 0.5 ** np.arange(1, 8)
    heap = [(-1.0, 1.0, 0)]
    for node in range(NUM_NODES + 1):
        if not heap:
            return
        psi, truth, depth = heapq.heappop(heap)
        if node:
            yield -psi, truth, depth
        if depth < num_frames:
            right = _sigmoid(np.array([logit + excess, logit]) - 0.15 * depth)
            for reported, true in zip(*(np.concatenate(([best], best * (1 - best) * shares)) for best in right)):
                heapq.heappush(heap, (psi * reported, truth * true, depth + 1))


def _sigmoid(logit: Any) -> Any:
    return 1 / (1 + np.exp(-logit))


@dataclass(frozen=True)
class Case:
    machine: Machine
    drafter: Drafter
    requests: str
    """A number, or "fewest to most" for a number that changes."""

    def __str__(self) -> str:
        return f"{self.machine.name}, {self.machine.plain_seconds:g} s, {self.drafter.name}, {self.requests}"

    def loads(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """[steps] R"""
        fewest, _, most = self.requests.partition(" to ")
        if not most:
            return np.full(num_steps, int(fewest))
        # The logarithm is a random walk, reflected at both ends, that moves every 20 steps.
        walk = np.repeat(rng.normal(0, 0.5, num_steps // 20 + 1).cumsum(), 20)[:num_steps]
        low, high = math.log(int(fewest)), math.log(int(most))
        return np.exp(low + np.abs((walk - low) % (2 * (high - low)) - (high - low))).round().astype(int)


class Traffic:
    """The requests of one case. Their contexts grow, and the difficulty of their texts is a random process."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, self.rng = case, np.random.default_rng(seed)
        self.num_requests = case.loads(self.rng, NUM_STEPS)
        most = int(self.num_requests.max())
        self.difficulty = self.rng.normal(size=most)
        self.prompts = self._new_prompts(most)
        self.emitted = self.rng.uniform(0, ANSWER, most)

    def _new_prompts(self, count: int) -> np.ndarray:
        low, high = np.log(self.case.machine.contexts)
        return np.exp(self.rng.uniform(low, high, count))

    def context(self, num_requests: int) -> np.ndarray:
        """[R] positions"""
        return self.prompts[:num_requests] + self.emitted[:num_requests]

    def texts(self, num_requests: int) -> np.ndarray:
        """[R], indices in GRID of the requests' logits in the next step."""
        self.difficulty += 0.5 * (self.rng.normal(size=len(self.difficulty)) * 3**0.5 - self.difficulty)
        drafter = self.case.drafter
        logits = drafter.level + drafter.spread * self.difficulty[:num_requests]
        return np.clip(np.rint((logits - GRID[0]) / (GRID[1] - GRID[0])), 0, len(GRID) - 1).astype(int)

    def emit(self, tokens: np.ndarray) -> None:
        """tokens: [R]"""
        self.emitted[: len(tokens)] += tokens
        ended = np.flatnonzero(self.emitted > ANSWER)
        self.prompts[ended], self.emitted[ended] = self._new_prompts(len(ended)), 0.0

    def noise(self) -> float:
        slow = 5.0 if self.rng.random() < 0.01 else 1.0
        return slow * math.exp(self.case.machine.noise * self.rng.normal())

    def drift(self, step: int) -> float:
        return 1 + self.case.machine.drift * math.sin(2 * math.pi * step / 1500)


def fixed_speedups(case: Case) -> tuple[np.ndarray, float]:
    """Expected speeds without noise: of each number of nodes in FIXED, and of the best table by batch size."""
    traffic = Traffic(case)
    trees = trees_of(case.drafter.excess)
    places = np.concatenate(
        [traffic.texts(len(traffic.difficulty)) for _ in range(max(2000 // len(traffic.difficulty), 50))]
    )
    tokens = 1 + trees.accepted[places][:, FIXED].sum(-1).mean(0)
    emitted, without = np.zeros((2, len(traffic.num_requests), len(FIXED)))
    for step, num_requests in enumerate(traffic.num_requests):
        traffic.emit(np.full(num_requests, 5.0))
        context = traffic.context(num_requests).sum() / 1000
        per_request = 1 + np.array(FIXED)
        seconds = case.machine.verifying(num_requests, num_requests * per_request, context, context * per_request)
        plain = seconds[0]
        seconds[1:] += case.machine.drafting(num_requests)
        emitted[step], without[step] = num_requests * tokens, num_requests * seconds / plain
    best = np.zeros(len(traffic.num_requests), int)
    for num_requests in np.unique(traffic.num_requests):
        here = traffic.num_requests == num_requests
        best[here] = np.argmax(emitted[here].sum(0) / without[here].sum(0))
    steps = np.arange(NUM_FIRST, len(best))
    table = emitted[steps, best[steps]].sum() / without[steps, best[steps]].sum()
    return emitted[NUM_FIRST:].sum(0) / without[NUM_FIRST:].sum(0), float(table)


@dataclass(frozen=True)
class Run:
    """Results by step."""

    tokens: np.ndarray
    """[steps], tokens that the step is expected to emit."""
    without: np.ndarray
    """[steps], tokens of plain decoding in the same time."""
    nodes: np.ndarray
    """[steps], verified nodes."""

    def speedup(self, first: int, last: int | None = None) -> float:
        return float(self.tokens[first:last].sum() / self.without[first:last].sum())

    @property
    def worst(self) -> float:
        """The lowest speed of any NUM_FIRST steps in sequence."""
        sums = (np.convolve(counts, np.ones(NUM_FIRST), "valid") for counts in (self.tokens, self.without))
        return float(np.divide(*sums).min())


def make_budget(machine: Machine, most_requests: int, rng: np.random.Generator) -> NodeBudget:
    """The budget after its start-up measurements, which are as noisy as later steps."""

    def noisy(seconds: Callable[[int], Any]) -> Callable[[int], float]:
        return lambda size: float(seconds(size)) * math.exp(machine.noise * rng.normal())

    target = measure(noisy(machine.target), target_sizes(most_requests * (1 + NUM_NODES)))
    return NodeBudget(target, measure(noisy(machine.drafting), drafting_sizes(most_requests)))


def simulate(case: Case, seed: int = 0) -> Run:
    traffic, machine = Traffic(case, seed), case.machine
    trees = trees_of(case.drafter.excess)
    budget = make_budget(machine, len(traffic.difficulty), traffic.rng)
    tokens, without, all_nodes = np.zeros((3, NUM_STEPS))
    places, nodes = np.zeros(0, int), np.zeros(0, int)
    for step, num_requests in enumerate(traffic.num_requests):
        # Requests that joined since the last step have no drafts.
        nodes = np.pad(nodes[:num_requests], (0, max(num_requests - len(nodes), 0)))
        places = np.pad(places[:num_requests], (0, max(num_requests - len(places), 0)))
        reached = trees.accepted[places, nodes]
        context = traffic.context(num_requests) / 1000
        rows = num_requests + int(nodes.sum())
        plain = machine.verifying(num_requests, num_requests, context.sum(), context.sum())
        seconds = machine.verifying(num_requests, rows, context.sum(), context @ (1 + nodes))
        accepted = (traffic.rng.random((num_requests, 1)) < reached).sum(1)
        expected = float(trees.expected_length[places, nodes].sum())
        plan = budget.plan(int(num_requests))
        if plan is not None:
            seconds += machine.drafting(num_requests)
        observed = seconds * traffic.drift(step) * traffic.noise()
        budget.observe(
            StepOutcome(
                int(num_requests), plan is not None, rows - num_requests, int(accepted.sum()), expected, observed
            )
        )
        tokens[step], without[step] = num_requests + reached.sum(), num_requests * seconds / plain
        all_nodes[step] = rows - num_requests
        traffic.emit(1 + accepted)
        places, nodes = traffic.texts(num_requests), np.zeros(num_requests, int)
        if plan is not None:
            nodes = np.array(budget.choose(plan, [row[row > 0].tolist() for row in trees.reported[places]]))
    return Run(tokens, without, all_nodes)


FLAT = Machine("flat", 0.03, 0.0005)
RISING = Machine("rising", 0.03, 0.02)
LINEAR = Machine("in proportion", 0.03, 1.0)
TILES = Machine("tiles of 16", 0.03, 0.03, tile=16)
ROOFLINE = Machine("flat to 64 rows", 0.03, 0.03, free_rows=64)
LONG = Machine("long contexts", 0.9, 0.01, attention=0.01, row_attention=0.0007, contexts=(500, 128_000))


def at_scale(machine: Machine, plain_seconds: float) -> Machine:
    return dataclasses.replace(machine, plain_seconds=plain_seconds)


CASES = [
    *(Case(at_scale(FLAT, each), GOOD, "1") for each in (0.001, 0.03, 0.45, 0.8, 2.0)),
    *(Case(at_scale(RISING, each), GOOD, "1") for each in (0.001, 0.03, 0.9, 2.0)),
    *(Case(at_scale(LINEAR, each), GOOD, "1") for each in (0.001, 0.03, 2.0)),
    *(Case(machine, GOOD, requests) for machine in (FLAT, RISING, TILES, ROOFLINE) for requests in ("4", "16", "64")),
    *(Case(machine, GOOD, "1 to 64") for machine in (FLAT, RISING, TILES, ROOFLINE, LINEAR)),
    *(Case(machine, FAIR, requests) for machine in (FLAT, RISING, TILES) for requests in ("1", "16")),
    *(Case(RISING, drafter, requests) for drafter in (OVERCONFIDENT, UNDERCONFIDENT) for requests in ("1", "16")),
    *(
        Case(machine, drafter, "4")
        for machine in (FLAT, RISING, LINEAR)
        for drafter in (USELESS, USELESS_OVERCONFIDENT)
    ),
    *(Case(RISING, drafter, "1 to 64") for drafter in (USELESS, USELESS_OVERCONFIDENT)),
    Case(dataclasses.replace(RISING, name="rising, a large drafter", draft=1.0), USELESS, "1"),
    Case(dataclasses.replace(RISING, name="rising, a large drafter", draft=0.5), GOOD, "1"),
    *(Case(LONG, drafter, requests) for drafter in (GOOD, USELESS) for requests in ("1", "4", "1 to 64")),
    *(
        Case(dataclasses.replace(RISING, name=f"{name}, noise and drift", **changes), GOOD, requests)
        for name, changes in (
            ("rising", {"noise": 0.2, "drift": 0.4}),
            ("in proportion", {"row": 1.0, "noise": 0.2, "drift": 0.4}),
        )
        for requests in ("1", "16")
    ),
]


def row_of(case: Case) -> dict[str, Any]:
    """One row of the table and of the JSON file."""
    fixed, table = fixed_speedups(case)
    run = simulate(case)
    return {
        "machine": case.machine.name,
        "plain_step_seconds": case.machine.plain_seconds,
        "drafter": case.drafter.name,
        "requests": int(case.requests) if case.requests.isdigit() else case.requests,
        "speedup": run.speedup(NUM_FIRST),
        "best_fixed_speedup": float(fixed.max()),
        "best_fixed_nodes": FIXED[int(fixed.argmax())],
        "table_speedup": table,
        "first_speedup": run.speedup(0, NUM_FIRST),
        "worst_speedup": run.worst,
        "nodes": float(run.nodes.sum() / len(run.nodes)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    names = ("speed", "fixed", "table", "first 1,000", "worst 1,000")
    print(f"{'machine':31}{'step':>7}  {'drafter':17}{'requests':9}" + "".join(f"{name:>13}" for name in names))
    rows = []
    for case in CASES:
        rows.append(row := row_of(case))
        speeds = ("speedup", "best_fixed_speedup", "table_speedup", "first_speedup", "worst_speedup")
        step = f"{row['plain_step_seconds']:6g}s"
        print(
            f"{row['machine']:31}{step}  {row['drafter']:17}{row['requests']!s:9}"
            + "".join(f"{row[name]:13.2f}" for name in speeds),
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
