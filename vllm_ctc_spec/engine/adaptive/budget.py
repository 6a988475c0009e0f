"""How many nodes a step verifies, and whether it drafts at all.

A node with prefix probability psi is expected to bring psi tokens, and costs a row. The time that the row takes could
bring tokens otherwise, at the rate at which the engine emits them; so of all requests' nodes, in descending psi, the
best number M makes

    sum of the M largest psi - rate * (seconds at R + M rows - seconds at R rows)

largest: the renewal-reward rule, under which no other choice has a higher rate in the long run. Each request's nodes
come in descending psi, so that what is chosen of a tree is a tree. R + M is one of the `row_counts`, because kernels
are made, and graphs recorded, for each number of rows.

The seconds by rows are measured at start-up (cost.py). What a node costs beyond them (attention to a long context, the
walk, its place in messages) is learnt from the steps, and so is how far the drafter's own psi may be trusted.

Whether drafting pays is never predicted: steps with drafts are compared with steps without, right before and after
them. Each load has an account, in plain steps' worth of tokens. Steps with drafts pay in what they emit more than plain
decoding would have, and take out what they emit less; when the account is empty, drafting ends. It is tried again out
of savings, which grow by a small share of all steps, so that what is lost stays such a share.

Letters: R requests, M chosen nodes of the batch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_ctc_spec.engine.adaptive.cost import Cost
from vllm_ctc_spec.engine.row_counts import row_counts

NUM_PLAIN = 8
"""Steps without drafts that others are compared with: under a new load, and at each look."""

FIRST_LOOK, LAST_LOOK = 32, 512
"""Steps with drafts before the next look at plain decoding; twice as many after each look at which they had paid."""

TRIAL = 4.0
"""Plain steps' worth of tokens in the account of a load that begins to draft."""

MOST_SAVED = 16.0
"""The same, in any account: what steps with drafts may lose until they end."""

LOST_SHARE = 0.01
"""Of all steps, what may be lost in trials."""

NUM_OBSERVED = 256
"""Latest steps with drafts that rates and the cost of a node are learnt from."""

LONGEST_STEP = 2.0
"""Times the median; what a step took beyond it does not count."""

TRUST_PRIOR, TRUST_DECAY = 8.0, 0.98
"""Nodes' worth of belief in the drafter's psi; and how much of the steps before counts at each step."""

NODE_PRIOR = 0.08
"""Weight of what a node is expected to cost beyond the table, in steps times squared nodes over their mean."""


@dataclass(frozen=True)
class DraftPlan:
    """To draft after this step, and what the next one may then verify."""

    num_requests: int
    """R of the batch; not all need have a tree."""
    rate: float
    """Tokens per second that the engine emits."""
    node_seconds: float
    """Of a node beyond the table of rows."""


@dataclass(frozen=True)
class StepOutcome:
    """A step of decoding alone."""

    num_requests: int
    drafted: bool
    """Whether it has drafted for the next step."""
    num_nodes: int
    """That it verified."""
    num_accepted: int
    believed: float
    """Sum of psi over the verified nodes."""
    seconds: float | None
    """None where it did not follow the step before at once."""


@dataclass
class _Load:
    """Steps with about as many requests. Times are multiples of the table's plain step, tokens are per request."""

    drafts: bool = False
    account: float = 0.0
    num_left: int = NUM_PLAIN
    """Steps until the next decision."""
    look_after: int = FIRST_LOOK
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=2 * NUM_PLAIN))
    """Times of the latest steps without drafts: those of two looks."""
    drafted: deque[tuple[float, float, float, float]] = field(default_factory=lambda: deque(maxlen=NUM_OBSERVED))
    """Tokens, times, the table's part of them for nodes, and nodes per request."""
    block: list[tuple[float, float]] = field(default_factory=list)
    """Tokens and times of steps with drafts since the last look."""

    @property
    def pace(self) -> float:
        return float(_cut(self.plain).mean()) if self.plain else 1.0

    def gain(self) -> float:
        """Of the block over plain decoding, in plain steps' worth of tokens."""
        tokens, times = np.array(self.block).T
        return float(tokens.sum() - _cut(times).sum() / self.pace)


class NodeBudget:
    """Three calls, in any order: `plan` whether to draft, `choose` the nodes to verify, `observe` what came of it."""

    def __init__(self, target: Cost, drafting: Cost) -> None:
        """target: by rows; drafting: by requests."""
        self._target, self._drafting = target, drafting
        self._loads: dict[int, _Load] = defaultdict(_Load)
        """By the number of bits of R."""
        self._savings = MOST_SAVED
        self._believed = self._accepted = 0.0

    def plan(self, num_requests: int) -> DraftPlan | None:
        """None where the next step is to verify nothing."""
        load = self._loads[num_requests.bit_length()]
        if not load.drafts:
            return None
        plain_seconds = float(self._target.at(num_requests))
        speed, node = 1 / load.pace, 0.0
        if len(load.drafted) >= NUM_PLAIN:
            seen = np.array(load.drafted).T
            seen[1] = _cut(seen[1])
            speed = max(speed, seen[0].sum() / seen[1].sum())
            node = self._node_time(load, seen, float(self._drafting.at(num_requests)) / plain_seconds)
        return DraftPlan(num_requests, speed * num_requests / plain_seconds, node * plain_seconds / num_requests)

    def _node_time(self, load: _Load, seen: np.ndarray, drafting: float) -> float:
        """Of a node per request beyond the table: a least-squares line through steps, held near what is expected while
        they are alike: that half of what is unexplained is nodes', and half steps'.
        """
        _, times, by_table, nodes = seen
        beyond, mean = times - by_table, nodes.mean()
        if mean == 0:
            return 0.0
        expected = (beyond.mean() - load.pace - drafting) / mean / 2
        spread, prior = nodes - mean, NODE_PRIOR * mean**2
        return max(float((spread @ beyond + prior * expected) / (spread @ spread + prior)), 0.0)

    def choose(self, plan: DraftPlan, trees: Sequence[Sequence[float]]) -> list[int]:
        """Nodes to verify of each tree; trees: psi of each one's nodes, in descending order."""
        owners = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
        psi = np.concatenate([np.asarray(tree, float) for tree in trees])
        order = np.argsort(-psi, kind="stable")
        trust = (self._accepted + TRUST_PRIOR) / (self._believed + TRUST_PRIOR)
        gains = np.concatenate(([0.0], np.minimum(trust * psi[order], 1.0).cumsum()))
        rows = np.array(row_counts(plan.num_requests + len(order)))
        nodes = np.concatenate(([0], rows[rows > plan.num_requests] - plan.num_requests))
        seconds = self._nodes_seconds(plan.num_requests, nodes) + plan.node_seconds * nodes
        best = int(nodes[np.argmax(gains[nodes] - plan.rate * seconds)])
        return np.bincount(owners[order[:best]], minlength=len(trees)).tolist()

    def _nodes_seconds(self, num_requests: int, num_nodes: np.ndarray) -> np.ndarray:
        seconds: np.ndarray = self._target.at(num_requests + num_nodes) - self._target.at(num_requests)
        return seconds

    def observe(self, outcome: StepOutcome) -> None:
        if outcome.num_nodes:
            self._believed = TRUST_DECAY * self._believed + outcome.believed
            self._accepted = TRUST_DECAY * self._accepted + outcome.num_accepted
        if outcome.seconds is None:
            return
        num_requests = outcome.num_requests
        load = self._loads[num_requests.bit_length()]
        self._savings = min(self._savings + LOST_SHARE, MOST_SAVED)
        plain_seconds = float(self._target.at(num_requests))
        time = outcome.seconds / plain_seconds
        if outcome.drafted or outcome.num_nodes:
            tokens = 1 + outcome.num_accepted / num_requests
            by_table = float(self._nodes_seconds(num_requests, np.array(outcome.num_nodes))) / plain_seconds
            load.drafted.append((tokens, time, by_table, outcome.num_nodes / num_requests))
            load.block.append((tokens, time))
            if load.drafts:
                self._after_drafts(load)
        else:
            load.plain.append(time)
            if not load.drafts:
                self._after_plain(load)

    def _after_drafts(self, load: _Load) -> None:
        load.num_left -= 1
        # What the account seems to be is checked against fresh plain steps before drafting ends.
        if load.num_left <= 0 or load.account + load.gain() < 0:
            load.drafts, load.num_left = False, NUM_PLAIN

    def _after_plain(self, load: _Load) -> None:
        load.num_left -= 1
        if load.num_left > 0:
            return
        if load.block:
            gain = load.gain()
            self._savings = min(self._savings + gain, MOST_SAVED)
            load.account = min(load.account + gain, MOST_SAVED)
            load.block.clear()
            load.look_after = min(2 * load.look_after, LAST_LOOK) if gain > 0 else FIRST_LOOK
        if load.account <= 0 and self._savings >= TRIAL:
            load.account, load.look_after = TRIAL, FIRST_LOOK
        load.drafts = load.account > 0
        load.num_left = load.look_after if load.drafts else 1


def _cut(times: Sequence[float] | np.ndarray) -> np.ndarray:
    """A step in which the machine stood still says nothing about drafts."""
    return np.minimum(times, LONGEST_STEP * np.median(times))
