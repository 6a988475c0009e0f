"""How many nodes a step verifies: those that pay for their rows; and whether drafting pays at all.

A node with prefix probability psi is expected to bring psi tokens, and costs a row. The time that the row takes could
bring tokens otherwise, at the rate at which the engine emits them; so of all requests' nodes, in descending psi, the
best number M makes

    sum of the M largest psi - rate * (seconds of the target at R + M rows - seconds at R rows)

largest: the renewal-reward rule, under which no other choice has a higher rate in the long run. Each request's nodes
come in descending psi, so that what is chosen of a tree is a tree. The target's seconds are measured at start-up, the
rate while serving, first without drafting, then with it; where it is higher without, drafting rests until what it has
lost is a small share of all, and is tried again.

Letters: R requests, N nodes of the largest tree, M chosen nodes of the batch.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

NUM_RUNS = 3
"""Of the target at each number of rows; the median counts."""

MOST_ROWS = 512
LONGEST_RUN = 1.0
"""Seconds. More rows than MOST_ROWS, or than those that take so long, are taken to cost in proportion."""

NUM_OBSERVED = 32
"""Latest steps that make a rate."""

FEWEST_OBSERVED = 4

NUM_PLAIN = 8
"""First steps under a load, without drafts, which later ones are compared with."""

NUM_TRIED = 6
"""Steps with drafts before it is asked whether they pay."""

LOST_SHARE = 0.01
"""Of the tokens of a rest, those that the steps with drafts before it may have lost."""

SHORTEST_REST, LONGEST_REST = 32, 2048
"""Steps"""

TRUST_DECAY = 0.98
TRUST_PRIOR = 8.0
"""Nodes' worth of belief in the drafter's own probabilities."""


@dataclass(frozen=True)
class TargetCost:
    rows: np.ndarray
    """[n] increasing numbers of rows"""
    seconds: np.ndarray
    """[n]"""

    def at(self, rows: Any) -> Any:
        """Seconds of the target at `rows`, elementwise: linear between measurements, in proportion beyond them."""
        return np.interp(rows, self.rows, self.seconds) * np.maximum(rows / self.rows[-1], 1.0)


def measure_target(run: Callable[[int], object], max_rows: int) -> TargetCost:
    """`run(rows)` is one pass of the target; measured at 1, 2, 4, ... and `max_rows` rows."""
    max_rows = min(max_rows, MOST_ROWS)
    sizes = [1 << power for power in range(max_rows.bit_length()) if 1 << power < max_rows]
    rows, seconds = [], []
    for size in [*sizes, max_rows]:
        rows.append(size)
        seconds.append(median(_timed(run, size) for _ in range(NUM_RUNS)))
        if seconds[-1] > LONGEST_RUN:
            break
    return TargetCost(np.array(rows), np.maximum.accumulate(seconds))


def _timed(run: Callable[[int], object], size: int) -> float:
    started = time.perf_counter()
    run(size)
    return time.perf_counter() - started


@dataclass
class _Mode:
    """What is done under one load."""

    drafts: bool = False
    num_left: int = NUM_PLAIN
    """Steps until drafting is judged, or until it is tried."""


class NodeBudget:
    def __init__(self, cost: TargetCost) -> None:
        self._cost = cost
        self._modes: dict[int, _Mode] = defaultdict(_Mode)
        """By load, the number of bits of the number of requests."""
        self._observed: dict[tuple[int, bool], deque[tuple[int, float]]] = defaultdict(
            lambda: deque(maxlen=NUM_OBSERVED)
        )
        """By load, and whether drafts were made: tokens and seconds."""
        self._kind = self._kind_before = (0, False)
        """Load, and whether drafts were made, of the step that ends and of the one before."""
        self._believed = self._accepted = 0.0

    def wants_drafts(self, num_requests: int) -> bool:
        """Asked once at the end of each step."""
        load = num_requests.bit_length()
        mode = self._modes[load]
        mode.num_left -= 1
        if mode.num_left <= 0 and not mode.drafts:
            mode.drafts, mode.num_left = True, NUM_TRIED
            self._observed[load, True].clear()
        elif mode.num_left <= 0 and (rest := self._rest(num_requests)):
            mode.drafts, mode.num_left = False, rest
        self._kind_before, self._kind = self._kind, (load, mode.drafts)
        return mode.drafts

    def _rest(self, num_requests: int) -> int:
        """Steps without drafts that make up for what the latest steps with drafts have lost; 0 if they have gained."""
        seen = self._observed[num_requests.bit_length(), True]
        without = self._rate(num_requests, False)
        rate = without or self._highest_rate(num_requests)
        lost = sum(seconds * rate - tokens for tokens, seconds in seen)
        if len(seen) < FEWEST_OBSERVED or lost <= 0:
            return 0
        longest = LONGEST_REST if without else SHORTEST_REST
        return int(np.clip(lost / (LOST_SHARE * num_requests), SHORTEST_REST, longest))

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Of a step of decoding alone, after `wants_drafts` was asked at its end."""
        if self._kind == self._kind_before:
            self._observed[self._kind].append((num_tokens, seconds))

    def observe_walk(self, believed: float, num_accepted: int) -> None:
        """believed: sum of psi over the verified nodes."""
        self._believed = TRUST_DECAY * self._believed + believed
        self._accepted = TRUST_DECAY * self._accepted + num_accepted

    def choose(self, probabilities: np.ndarray, num_requests: int) -> np.ndarray:
        """Nodes to verify of each tree, [R] int64.

        probabilities: [R, N], psi in descending order, 0 behind a tree's last node; num_requests: those of the batch,
        of which the R draft.
        """
        trust = (self._accepted + TRUST_PRIOR) / (self._believed + TRUST_PRIOR)
        flat = probabilities.ravel()
        order = np.argsort(-flat, kind="stable")[: np.count_nonzero(flat)]
        seconds = self._cost.at(num_requests + np.arange(len(order) + 1))
        gains = np.minimum(trust * flat[order], 1.0).cumsum()
        rates = [self._rate(num_requests, drafts) for drafts in (True, False)]
        rate = max((rate for rate in rates if rate is not None), default=self._highest_rate(num_requests))
        num_chosen = int(np.argmax(np.concatenate(([0.0], gains)) - rate * (seconds - seconds[0])))
        return np.bincount(order[:num_chosen] // probabilities.shape[1], minlength=len(probabilities))

    def _rate(self, num_requests: int, drafts: bool) -> float | None:
        """Tokens per second of such steps, once enough of them were seen."""
        seen = self._observed[num_requests.bit_length(), drafts]
        if len(seen) < FEWEST_OBSERVED:
            return None
        return sum(tokens for tokens, _ in seen) / sum(seconds for _, seconds in seen)

    def _highest_rate(self, num_requests: int) -> float:
        """Of decoding without drafts, if there were nothing but the target: so it is tried where it may be better."""
        return num_requests / float(self._cost.at(num_requests))
