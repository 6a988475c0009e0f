"""Chooses how many nodes a step verifies, and whether it drafts at all. docs/adaptive.md has the rules in full.

A node with prefix probability psi is expected to emit psi tokens, and costs a row. In the time of that row the engine
could emit tokens otherwise, at its rate. So of the nodes of all requests, in descending psi, the best number M
maximises

    sum of the M largest psi - rate * (seconds at R + M rows - seconds at R rows).

This is the renewal-reward rule: no other choice has a higher rate in the long run. Each request's nodes come in
descending psi, so the chosen part of a tree is a tree. R + M is one of the `row_counts`, because kernels are compiled,
and graphs recorded, for each number of rows.

The seconds by rows are measured at start-up (cost.py). The cost of a node beyond them (attention to a long context, the
walk, messages) is estimated from the steps, as is the number of tokens per unit of psi.

Whether drafting is faster is measured: steps with drafts are compared with plain steps before and after them. Each load
has a balance, in tokens of plain steps. Tokens that drafting emits beyond those of plain decoding in the same time are
added to it, and missing ones subtracted. When the balance is empty, drafting pauses until the loss is a small share of
all tokens. A trial ends earlier if it should have lost by psi and the table of seconds.

Letters: R requests, M chosen nodes of the batch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_ctc_spec.engine.adaptive.cost import Cost
from vllm_ctc_spec.engine.row_counts import row_counts

PROBE_STEPS = 8
"""Plain steps of a probe. Estimates from steps with drafts are updated after as many of them."""

FIRST_PROBE_AFTER, LAST_PROBE_AFTER = 32, 512
"""Steps with drafts before the next probe of plain decoding. The number doubles after each probe that finds drafting
faster."""

INITIAL_BALANCE, MAX_BALANCE = 4.0, 16.0
"""Balance of a load when it begins to draft, and its maximum, in tokens of plain steps."""

MAX_EXPECTED_LOSS = 1.0
"""A trial also ends when by psi and the table of seconds it should have lost the tokens of so many plain steps."""

TRIAL_LOSS_SHARE = 0.005
"""Share of a load's steps that trials may lose. It sets the length of the pause after a trial that has lost."""

OBSERVED_STEPS = 128
"""Number of the latest steps with drafts from which speed and node cost are estimated."""

OUTLIER = 2.0
"""In medians: time of a step beyond it is not counted, because something interrupted the machine."""

PRIOR, DECAY = 8.0, 0.98
"""PRIOR: weight of the drafter's psi, in nodes, and of the table of seconds, in steps. DECAY: factor on sums over nodes
at each step.
"""


@dataclass(frozen=True)
class DraftPlan:
    """Draft after this step. The fields decide what the next step may verify."""

    num_requests: int
    """R of the batch; some of them may have no tree."""
    rate: float
    """Tokens per second that the engine emits."""
    node_seconds: float
    """Seconds per node beyond the table."""
    asks_drafter: bool = True
    """False where retrieval alone drafts."""


@dataclass(frozen=True)
class StepOutcome:
    """Result of a step."""

    num_requests: int
    drafted: bool
    """Whether the step has drafted for the next one."""
    num_nodes: int
    """Verified nodes."""
    num_accepted: int
    expected: float
    """Sum of psi over the verified nodes."""
    seconds: float | None
    """None if unknown: the step had prompts in it, or did not follow the step before at once."""


@dataclass
class _Load:
    """State of all steps with a similar number of requests.

    Times are multiples of the table's plain step; tokens and nodes are per request.
    """

    drafts: bool = False
    balance: float = 0.0
    steps_left: int = PROBE_STEPS
    """Steps until the next probe, or until the present probe or pause ends."""
    probe_after: int = FIRST_PROBE_AFTER
    """Steps with drafts between two probes."""
    plain_times: deque[float] = field(default_factory=lambda: deque(maxlen=2 * PROBE_STEPS))
    """Times of the latest plain steps: those of two probes."""
    plain_time: float = 1.0
    """Their mean, without outliers."""
    recent: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=OBSERVED_STEPS))
    """Of the latest steps with drafts: tokens, time without the nodes' cost by the table, that cost, and nodes."""
    median_time: float = 0.0
    """Median of the second of these; 0 if unknown."""
    tokens: float = 0.0
    time: float = 0.0
    """Sums over the steps with drafts since the last probe."""
    speed: float = 1.0
    """Tokens / time, of plain steps or of steps with drafts, whichever is higher."""
    node_time: float = 0.0
    """Time per node beyond the table."""
    expected_gain: float = 0.0
    """Gain of the trees since drafting began, by psi and the table of seconds."""

    @property
    def loses_by_estimate(self) -> bool:
        """Whether psi and the table predict a loss that no measured gain outweighs."""
        return self.expected_gain + max(self.balance + self.gain - INITIAL_BALANCE, 0.0) < -MAX_EXPECTED_LOSS

    @property
    def gain(self) -> float:
        """Tokens since the last probe, beyond those of plain decoding in the same time."""
        return self.tokens - self.time / self.plain_time

    def update(self, drafting: float) -> None:
        """Update the estimates from the latest steps with drafts; drafting: its time by the table."""
        tokens, beyond, by_table, nodes = np.array(self.recent).T
        self.median_time = float(np.median(beyond))
        self.speed = max(1 / self.plain_time, tokens.sum() / (beyond + by_table).sum())
        if mean := nodes.mean():
            # The slope is estimated from changes between steps, because contexts and the machine's speed drift slowly.
            # While numbers of nodes hardly change, the prior holds: half of the unexplained time is due to nodes.
            change, prior = np.diff(nodes), PRIOR * (0.1 * mean) ** 2
            expected = (beyond.mean() - self.plain_time - drafting) / mean / 2
            self.node_time = max((change @ np.diff(beyond) + prior * expected) / (change @ change + prior), 0.0)


class NodeBudget:
    """`plan` decides whether to draft, `choose` the nodes to verify, `observe` takes a step's result. Calls may come in
    any order."""

    def __init__(self, target: Cost, drafting: Cost) -> None:
        """target: seconds by rows; drafting: seconds by requests."""
        self._target, self._drafting = target, drafting
        self._loads: dict[int, _Load] = defaultdict(_Load)
        """By R.bit_length()."""
        self._expected = self._accepted = 0.0

    def plan(self, num_requests: int) -> DraftPlan | None:
        """None if nothing is to be drafted for the next step."""
        load = self._loads[num_requests.bit_length()]
        if not load.drafts:
            return None
        seconds = float(self._target.at(num_requests))
        return DraftPlan(num_requests, load.speed * num_requests / seconds, load.node_time * seconds / num_requests)

    def should_draft(self, plan: DraftPlan, gain: float) -> bool:
        """Whether the drafter takes less time than emitting `gain` tokens otherwise."""
        return bool(gain > plan.rate * self._drafting.at(plan.num_requests))

    def choose(self, plan: DraftPlan, trees: Sequence[Sequence[float]]) -> list[int]:
        """Number of nodes to verify of each tree. trees: psi of each tree's nodes, in descending order."""
        owners = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
        psi = np.concatenate([np.asarray(tree, float) for tree in trees])
        order = np.argsort(-psi, kind="stable")
        correction = (self._accepted + PRIOR) / (self._expected + PRIOR)
        gains = np.concatenate(([0.0], np.minimum(correction * psi[order], 1.0).cumsum()))
        rows = np.array(row_counts(plan.num_requests + len(order)))
        nodes = np.concatenate(([0], rows[rows > plan.num_requests] - plan.num_requests))
        seconds = self._nodes_seconds(plan.num_requests, nodes) + plan.node_seconds * nodes
        best = int(nodes[chosen := np.argmax(gains[nodes] - plan.rate * seconds)])
        load = self._loads[plan.num_requests.bit_length()]
        drafting = float(self._drafting.at(plan.num_requests)) if plan.asks_drafter else 0.0
        longer = (drafting + seconds[chosen]) / self._target.at(plan.num_requests)
        expected_gain = load.expected_gain + gains[best] / plan.num_requests - longer / load.plain_time
        load.expected_gain = float(np.clip(expected_gain, -2 * INITIAL_BALANCE, MAX_BALANCE))
        return np.bincount(owners[order[:best]], minlength=len(trees)).tolist()

    def _nodes_seconds(self, num_requests: int, num_nodes: np.ndarray) -> np.ndarray:
        seconds: np.ndarray = self._target.at(num_requests + num_nodes) - self._target.at(num_requests)
        return seconds

    def observe(self, outcome: StepOutcome) -> None:
        """Take the result of a step into account."""
        if outcome.num_nodes:
            self._expected = DECAY * self._expected + outcome.expected
            self._accepted = DECAY * self._accepted + outcome.num_accepted
        if outcome.seconds is None:
            return
        num_requests, num_nodes = outcome.num_requests, outcome.num_nodes
        load, seconds = self._loads[num_requests.bit_length()], float(self._target.at(num_requests))
        time, tokens = outcome.seconds / seconds, 1 + outcome.num_accepted / num_requests
        load.steps_left -= 1
        if outcome.drafted or num_nodes:
            by_table = float(self._nodes_seconds(num_requests, np.array(num_nodes))) / seconds
            drafting = float(self._drafting.at(num_requests)) / seconds
            beyond = min(time - by_table, OUTLIER * (load.median_time or load.plain_time + drafting))
            load.recent.append((tokens, beyond, by_table, num_nodes / num_requests))
            if load.drafts or load.time:
                load.tokens += tokens
                load.time += beyond + by_table
            if load.drafts:
                if load.steps_left % PROBE_STEPS == 0:
                    load.update(drafting)
                # If the balance seems empty, drafting ends only after a probe has measured plain steps again.
                if load.steps_left <= 0 or load.balance + load.gain < 0 or load.loses_by_estimate:
                    load.drafts, load.steps_left = False, PROBE_STEPS
        else:
            load.plain_times.append(time)
            if not load.drafts and load.steps_left <= 0:
                self._decide(load)

    def _decide(self, load: _Load) -> None:
        """Decide whether to draft, at the end of a probe or of a pause."""
        plain_times = np.array(load.plain_times)
        load.plain_time = float(np.minimum(plain_times, OUTLIER * np.median(plain_times)).mean())
        if not load.time:
            load.balance, load.probe_after, load.expected_gain = INITIAL_BALANCE, FIRST_PROBE_AFTER, 0.0
        else:
            gain, load.tokens, load.time = load.gain, 0.0, 0.0
            load.probe_after = min(2 * load.probe_after, LAST_PROBE_AFTER) if gain > 0 else FIRST_PROBE_AFTER
            load.balance = min(load.balance + gain, MAX_BALANCE)
            if load.balance <= 0 or load.loses_by_estimate:
                load.steps_left = int(max(INITIAL_BALANCE - load.balance, MAX_EXPECTED_LOSS) / TRIAL_LOSS_SHARE)
                return
        load.drafts, load.steps_left = True, load.probe_after
