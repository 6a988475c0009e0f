"""How many nodes a step verifies, and whether it drafts at all.

A node with prefix probability psi is expected to bring psi tokens, and costs a row. The time that the row takes could
bring tokens otherwise, at the rate at which the engine emits them; so of all requests' nodes, in descending psi, the
best number M makes

    sum of the M largest psi - rate * (seconds at R + M rows - seconds at R rows)

largest: the renewal-reward rule, under which no other choice has a higher rate in the long run. Each request's nodes
come in descending psi, so that what is chosen of a tree is a tree. R + M is one of the `row_counts`, because kernels
are made, and graphs recorded, for each number of rows.

The seconds by rows are measured at start-up (cost.py). What a node costs beyond them (attention to a long context, the
walk, its place in messages) is learnt from the steps, and so is how many tokens a sum of psi brings in truth.

Whether drafting is faster is observed: steps with drafts are compared with plain steps, right before and after them.
Each load has an account, in plain steps' worth of tokens. What steps with drafts emit more than plain decoding would
have in their time is added to it, and what they emit less is taken out; when the account is empty, drafting pauses
until what was lost is a small share of all. A trial ends sooner where psi and the table of seconds say that it loses.

Letters: R requests, M chosen nodes of the batch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_ctc_spec.engine.adaptive.cost import Cost
from vllm_ctc_spec.engine.row_counts import row_counts

NUM_JUDGED = 8
"""Steps of one kind, with drafts or without, after each of which it is judged which are faster."""

FIRST_LOOK, LAST_LOOK = 32, 512
"""Steps with drafts before the next look at plain decoding; twice as many after each look that finds them faster."""

TRIAL, MOST_SAVED = 4.0, 16.0
"""Plain steps' worth of tokens in the account of a load when it begins to draft, and at most."""

EXPECTED_LOSS = 1.0
"""The same: a trial ends, too, when by the drafter's own psi and the table it should have lost so much."""

LOST_SHARE = 0.005
"""Of the steps of a load, what trials may lose; it sets how long drafting pauses after a trial that has lost."""

NUM_OBSERVED = 128
"""Latest steps with drafts that rates and the cost of a node are learnt from."""

LONGEST_STEP = 2.0
"""Times the median; what a step took beyond it does not count, because the machine stood still."""

PRIOR, DECAY = 8.0, 0.98
"""Weight of the drafter's own psi, in nodes, and of the table of rows, in steps; and what share of a sum over nodes is
left after a step.
"""


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
    """A step, at its end."""

    num_requests: int
    drafted: bool
    """Whether it has drafted for the next step."""
    num_nodes: int
    """That it verified."""
    num_accepted: int
    expected: float
    """Sum of psi over the verified nodes."""
    seconds: float | None
    """None where it is not known: the step had prompts in it, or did not follow the one before at once."""


@dataclass
class _Load:
    """Steps with about as many requests. Times are multiples of the table's plain step, tokens are per request."""

    drafts: bool = False
    account: float = 0.0
    num_left: int = NUM_JUDGED
    """Steps until plain decoding is looked at, or until the look ends."""
    look_after: int = FIRST_LOOK
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=2 * NUM_JUDGED))
    """Times of the latest steps without drafts: those of two looks."""
    pace: float = 1.0
    """Their mean."""
    latest: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=NUM_OBSERVED))
    """Tokens, times, the table's part of them for nodes, and nodes per request, of steps with drafts."""
    usual: float = 0.0
    """Median of their times without the table's part; 0 where it is not known."""
    tokens: float = 0.0
    time: float = 0.0
    """Sums over the steps with drafts since the last look."""
    speed: float = 1.0
    """Tokens over time, the higher one of both kinds of steps."""
    node_time: float = 0.0
    """Of a node per request, beyond the table."""
    expected_gain: float = 0.0
    """Of the trees since drafting began, by the table and the drafter's psi."""

    @property
    def loses_by_table(self) -> bool:
        """Unless it has gained more than that."""
        return self.expected_gain + max(self.account + self.gain - TRIAL, 0.0) < -EXPECTED_LOSS

    @property
    def gain(self) -> float:
        """Since the last look, over plain decoding."""
        return self.tokens - self.time / self.pace

    def learn(self, drafting: float) -> None:
        """From the latest steps with drafts; drafting: its time by the table."""
        tokens, beyond, by_table, nodes = np.array(self.latest).T
        self.usual = float(np.median(beyond))
        self.speed = max(1 / self.pace, tokens.sum() / (beyond + by_table).sum())
        if mean := nodes.mean():
            # From step to step, because contexts and the machine's pace change slowly; held near what is expected while
            # steps are alike: that half of what is unexplained is nodes', and half steps'.
            change, prior = np.diff(nodes), PRIOR * (0.1 * mean) ** 2
            expected = (beyond.mean() - self.pace - drafting) / mean / 2
            self.node_time = max((change @ np.diff(beyond) + prior * expected) / (change @ change + prior), 0.0)


class NodeBudget:
    """Three calls, in any order: `plan` whether to draft, `choose` the nodes to verify, `observe` what came of it."""

    def __init__(self, target: Cost, drafting: Cost) -> None:
        """target: by rows; drafting: by requests."""
        self._target, self._drafting = target, drafting
        self._loads: dict[int, _Load] = defaultdict(_Load)
        """By the number of bits of R."""
        self._expected = self._accepted = 0.0

    def plan(self, num_requests: int) -> DraftPlan | None:
        """None where the next step is to verify nothing."""
        load = self._loads[num_requests.bit_length()]
        if not load.drafts:
            return None
        seconds = float(self._target.at(num_requests))
        return DraftPlan(num_requests, load.speed * num_requests / seconds, load.node_time * seconds / num_requests)

    def choose(self, plan: DraftPlan, trees: Sequence[Sequence[float]]) -> list[int]:
        """Nodes to verify of each tree; trees: psi of each one's nodes, in descending order."""
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
        longer = (float(self._drafting.at(plan.num_requests)) + seconds[chosen]) / self._target.at(plan.num_requests)
        expected_gain = load.expected_gain + gains[best] / plan.num_requests - longer / load.pace
        load.expected_gain = float(np.clip(expected_gain, -2 * TRIAL, MOST_SAVED))
        return np.bincount(owners[order[:best]], minlength=len(trees)).tolist()

    def _nodes_seconds(self, num_requests: int, num_nodes: np.ndarray) -> np.ndarray:
        seconds: np.ndarray = self._target.at(num_requests + num_nodes) - self._target.at(num_requests)
        return seconds

    def observe(self, outcome: StepOutcome) -> None:
        if outcome.num_nodes:
            self._expected = DECAY * self._expected + outcome.expected
            self._accepted = DECAY * self._accepted + outcome.num_accepted
        if outcome.seconds is None:
            return
        num_requests, num_nodes = outcome.num_requests, outcome.num_nodes
        load, seconds = self._loads[num_requests.bit_length()], float(self._target.at(num_requests))
        time, tokens = outcome.seconds / seconds, 1 + outcome.num_accepted / num_requests
        load.num_left -= 1
        if outcome.drafted or num_nodes:
            by_table = float(self._nodes_seconds(num_requests, np.array(num_nodes))) / seconds
            drafting = float(self._drafting.at(num_requests)) / seconds
            beyond = min(time - by_table, LONGEST_STEP * (load.usual or load.pace + drafting))
            load.latest.append((tokens, beyond, by_table, num_nodes / num_requests))
            if load.drafts or load.time:
                load.tokens += tokens
                load.time += beyond + by_table
            if load.drafts:
                if load.num_left % NUM_JUDGED == 0:
                    load.learn(drafting)
                # An account that seems to be empty is held against plain steps of now before drafting ends.
                if load.num_left <= 0 or load.account + load.gain < 0 or load.loses_by_table:
                    load.drafts, load.num_left = False, NUM_JUDGED
        else:
            load.plain.append(time)
            if not load.drafts and load.num_left <= 0:
                self._decide(load)

    def _decide(self, load: _Load) -> None:
        """At the end of a look or of a pause."""
        plain = np.array(load.plain)
        load.pace = float(np.minimum(plain, LONGEST_STEP * np.median(plain)).mean())
        if not load.time:
            load.account, load.look_after, load.expected_gain = TRIAL, FIRST_LOOK, 0.0
        else:
            gain, load.tokens, load.time = load.gain, 0.0, 0.0
            load.look_after = min(2 * load.look_after, LAST_LOOK) if gain > 0 else FIRST_LOOK
            load.account = min(load.account + gain, MOST_SAVED)
            if load.account <= 0 or load.loses_by_table:
                load.num_left = int(max(TRIAL - load.account, EXPECTED_LOSS) / LOST_SHARE)
                return
        load.drafts, load.num_left = True, load.look_after
