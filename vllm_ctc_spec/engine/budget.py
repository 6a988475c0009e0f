"""How many nodes a step verifies: those that pay for their rows; and whether drafting pays at all.

A node with prefix probability psi is expected to bring psi tokens, and costs a row. The time that the row takes could
bring tokens otherwise, at the rate at which the engine emits them; so of all requests' nodes, in descending psi, the
best number M makes

    sum of the M largest psi - rate * (seconds at R + M rows - seconds at R rows)

largest: the renewal-reward rule, under which no other choice has a higher rate in the long run. Each request's nodes
come in descending psi, so that what is chosen of a tree is a tree. The target's seconds are measured at start-up; that
a row costs more than the target's pass (attention to a long context, the walk, its place in messages) is learnt from
the steps. So is the rate, first without drafting, then with it; where it is higher without, drafting rests until what
it has lost is a small share of all, and is tried again. Where it is higher with drafting, decoding without is looked at
again from time to time, because the machine may have been slow when it was.

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

NUM_OBSERVED = 64
"""Latest steps with drafts that make a rate."""

FEWEST_OBSERVED = 4

LONGEST_STEP = 2.0
"""Times the median of the steps with drafts; what a longer one took beyond it does not count."""

NUM_PLAIN = 16
"""Steps without drafts, which others are compared with: under a new load, and at each look."""

NUM_PLAIN_OBSERVED = 8
"""The latest of them count, because the first after others are slow."""

FIRST_LOOK, LAST_LOOK = 64, 512
"""Steps with drafts before decoding without is looked at again; twice as many after each look."""

NUM_TRIED = 6
"""Steps with drafts before it is asked whether they pay."""

SURE = 1.0
"""Standard deviations by which steps with drafts must have lost, or a few unlucky ones would end what pays."""

LOST_SHARE = 0.01
"""Of the tokens of a rest, those that the steps with drafts before it may have lost."""

SHORTEST_REST, LONGEST_REST = 32, 2048
"""Steps"""

FACTOR_PRIOR = 8.0
"""Steps' worth of belief that a row costs what the target's pass does; such steps differ by 10 %."""

LARGEST_FACTOR = 5.0

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
    num_until_look: int = FIRST_LOOK
    """Steps with drafts"""
    look_after: int = FIRST_LOOK


class NodeBudget:
    def __init__(self, cost: TargetCost) -> None:
        self._cost = cost
        self._modes: dict[int, _Mode] = defaultdict(_Mode)
        """By load, the number of bits of the number of requests."""
        self._observed: dict[bool, dict[int, deque[tuple[int, float, int]]]] = {
            True: defaultdict(lambda: deque(maxlen=NUM_OBSERVED)),
            False: defaultdict(lambda: deque(maxlen=NUM_PLAIN_OBSERVED)),
        }
        """By whether drafts were made, and load: tokens, seconds and rows."""
        self._kind = self._kind_before = (0, False)
        """Load, and whether drafts were made, of the step that ends and of the one before."""
        self._believed = self._accepted = 0.0

    def wants_drafts(self, num_requests: int) -> bool:
        """Asked once at the end of each step."""
        load = num_requests.bit_length()
        mode = self._modes[load]
        mode.num_left -= 1
        mode.num_until_look -= mode.drafts
        if mode.num_left <= 0 and not mode.drafts:
            mode.drafts, mode.num_left = True, NUM_TRIED
        elif mode.num_left <= 0 and (rest := self._rest(num_requests)):
            self._modes[load] = mode = _Mode(num_left=rest)
            self._observed[True][load].clear()
        elif mode.num_until_look <= 0:
            longer = min(2 * mode.look_after, LAST_LOOK)
            self._modes[load] = mode = _Mode(num_until_look=longer, look_after=longer)
        self._kind_before, self._kind = self._kind, (load, mode.drafts)
        return mode.drafts

    def _rest(self, num_requests: int) -> int:
        """Steps without drafts that make up for what the latest steps with drafts have lost; 0 if they have gained."""
        if (seen := self._drafted(num_requests)) is None:
            return 0
        tokens, seconds, _ = seen
        without = self._rate_without(num_requests)
        losses = seconds * (without or self._highest_rate(num_requests)) - tokens
        lost = losses.sum()
        if lost <= SURE * losses.std() * len(losses) ** 0.5:
            return 0
        longest = LONGEST_REST if without else SHORTEST_REST
        return int(np.clip(lost / (LOST_SHARE * num_requests), SHORTEST_REST, longest))

    def observe_step(self, num_tokens: int, seconds: float, num_rows: int) -> None:
        """Of a step of decoding alone, after `wants_drafts` was asked at its end."""
        if self._kind == self._kind_before:
            load, drafts = self._kind
            self._observed[drafts][load].append((num_tokens, seconds, num_rows))

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
        costs = self._row_factor(num_requests) * (seconds - seconds[0])
        gains = np.minimum(trust * flat[order], 1.0).cumsum()
        rates = [rate(num_requests) for rate in (self._rate_with, self._rate_without)]
        rate = max((rate for rate in rates if rate is not None), default=self._highest_rate(num_requests))
        num_chosen = int(np.argmax(np.concatenate(([0.0], gains)) - rate * costs))
        return np.bincount(order[:num_chosen] // probabilities.shape[1], minlength=len(probabilities))

    def _drafted(self, num_requests: int) -> np.ndarray | None:
        """[3, n] tokens, seconds and rows of the latest steps with drafts, once there are enough of them."""
        seen = self._observed[True][num_requests.bit_length()]
        if len(seen) < FEWEST_OBSERVED:
            return None
        steps = np.array(seen).T
        # A step in which the machine stood still says nothing about drafts.
        steps[1] = np.minimum(steps[1], LONGEST_STEP * np.median(steps[1]))
        return steps

    def _rate_with(self, num_requests: int) -> float | None:
        """Tokens per second of the latest steps with drafts, once enough of them were seen."""
        if (seen := self._drafted(num_requests)) is None:
            return None
        tokens, seconds, _ = seen
        return float(tokens.sum() / seconds.sum())

    def _rate_without(self, num_requests: int) -> float | None:
        """The same without drafts. Such steps differ in nothing but the machine's moods, and few of them count."""
        seen = self._observed[False][num_requests.bit_length()]
        return median(tokens / seconds for tokens, seconds, _ in seen) if len(seen) >= FEWEST_OBSERVED else None

    def _row_factor(self, num_requests: int) -> float:
        """How many times the target's own seconds a further row has cost: the slope of a least-squares line through
        the steps with drafts, held near 1 while they are few or alike.
        """
        if (seen := self._drafted(num_requests)) is None:
            return 1.0
        _, seconds, rows = seen
        target = self._cost.at(rows)
        prior = FACTOR_PRIOR * (0.1 * target.mean()) ** 2
        spread = target - target.mean()
        slope = (spread @ (seconds - seconds.mean()) + prior) / (spread @ spread + prior)
        return float(np.clip(slope, 1.0, LARGEST_FACTOR))

    def _highest_rate(self, num_requests: int) -> float:
        """Of decoding without drafts, if there were nothing but the target: so it is tried where it may be better."""
        return num_requests / float(self._cost.at(num_requests))
