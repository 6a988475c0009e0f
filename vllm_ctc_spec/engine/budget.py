"""How many nodes a step verifies: those that pay for their rows; and whether drafting pays at all.

A node with prefix probability psi is expected to bring psi tokens, and costs a row. The time that the row takes could
bring tokens otherwise, at the rate at which the engine emits them; so of all requests' nodes, in descending psi, the
best number M makes

    sum of the M largest psi - rate * (seconds at R + M rows - seconds at R rows)

largest: the renewal-reward rule, under which no other choice has a higher rate in the long run. Each request's nodes
come in descending psi, so that what is chosen of a tree is a tree. The target's seconds are measured at start-up; that
a row costs more than the target's pass (attention to a long context, the walk, its place in messages) is learnt from
the steps. R + M is one of the `row_counts`, because kernels are made, and graphs recorded, for each number of rows.

A frame is drafted for all requests, and pays in the same way: if the chosen nodes of its depth bring more than its
seconds. What they bring is known from steps with all frames, the first under a load and now and then another.

The rate is learnt from the steps, first without drafting, then with it, and compared at the same context, because the
target's attention may take most of a step; where drafting's is not higher by a tenth, it rests until what it has lost
is a small share of all, and is tried again, unless what was measured at start-up and what trees are worth say that it
cannot pay. Where it is higher with drafting, decoding without is looked at again from time to time, because the machine
may have been slow when it was.

Letters: R requests, N nodes of the largest tree, M chosen nodes of the batch, T frames.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from vllm_ctc_spec.engine.row_counts import doublings, row_counts

NUM_SWEEPS = 5
"""Through all sizes at most; the fastest run of each counts, because the first makes kernels and others may be slow."""

AGREEMENT = 1.05
"""A size whose second fastest run took at most so many times its fastest is not run again."""

MOST_ROWS, MOST_DRAFTING = 512, 64
LONGEST_RUN = 0.5
"""Seconds. More rows or requests than that, or than those that take so long, are taken to cost in proportion."""

NUM_OBSERVED = 256
"""Latest steps that make a rate, with drafts and without."""

FEWEST_OBSERVED = 4

LONGEST_STEP = 2.0
"""Times the median of such steps; what a longer one took beyond it does not count."""

LARGEST_SHARE = 0.9
"""Of a step, that grows with the context."""

NUM_PLAIN = 16
"""Steps without drafts, which others are compared with: under a new load, and at each look."""

NUM_PLAIN_OBSERVED = 8
"""The latest of them are the machine's pace, because the first after others are slow."""

CONTEXT_PRIOR = 0.5
"""Steps' worth of belief, in squares of relative deviations, that the context costs nothing."""

FIRST_LOOK, LAST_LOOK = 32, 512
"""Steps with drafts before decoding without is looked at again; twice as many after each look."""

NUM_JUDGED = 8
"""Steps with drafts, after each of which it is asked whether they pay."""

LEAST_SPEEDUP = 1.1
"""Of steps that pay. Requests that draft drift apart, and the last ones decode with few beside them: where a batch is
waited for as a whole, a smaller gain is lost again.
"""

SURE = 1.0
"""Standard deviations by which steps with drafts must lack it, or a few unlucky ones would end what pays."""

LOST_SHARE = 0.01
"""Of the tokens of a rest, those that the steps with drafts before it may have lost."""

SHORTEST_REST, LONGEST_REST = 32, 8192
"""Steps; each rest is twice as long as that before it, unless drafts have paid meanwhile."""

FACTOR_PRIOR = 8.0
"""Steps' worth of belief that a row costs what the target's pass does; such steps differ by 10 %."""

LARGEST_FACTOR = 5.0

TRUST_DECAY = 0.98
TRUST_PRIOR = 8.0
"""Nodes' worth of belief in the drafter's own probabilities."""

MOST_LEFT_OUT = 0.05
"""psi of nodes of all frames that need not be built: what trees are worth is learnt for less busy loads, too."""

PROFILE_DECAY = 0.9
"""Of what trees and their depths are worth, at each step with all frames; and of the least psi chosen."""

NUM_WHOLE, WHOLE_AGAIN = 16, 32
"""Trees of all frames before any is left out, and steps from one with all frames to the next."""


@dataclass(frozen=True)
class Cost:
    sizes: np.ndarray
    """[n] increasing"""
    seconds: np.ndarray
    """[n]"""

    def at(self, sizes: Any) -> Any:
        """Seconds at `sizes`, elementwise: linear between measurements, in proportion beyond them."""
        return np.interp(sizes, self.sizes, self.seconds) * np.maximum(sizes / self.sizes[-1], 1.0)


def measure(run: Callable[[int], object], sizes: list[int]) -> Cost:
    """Of `run(size)`, up to the first size that takes LONGEST_RUN.

    A larger size may be faster: with AMX some products of 8 rows are faster than those of 4.
    """
    times: dict[int, list[float]] = {}
    for size in sizes:
        run(size)
        times[size] = [_timed(run, size)]
        if times[size][0] > LONGEST_RUN:
            break
    for _ in range(NUM_SWEEPS - 2):
        for size, seen in times.items():
            if not _agree(seen):
                seen.append(_timed(run, size))
    return Cost(np.array(list(times)), np.array(list(map(min, times.values()))))


def _agree(seconds: list[float]) -> bool:
    fastest = sorted(seconds)[:2]
    return len(fastest) == 2 and fastest[1] <= AGREEMENT * fastest[0]


def _timed(run: Callable[[int], object], size: int) -> float:
    started = time.perf_counter()
    run(size)
    return time.perf_counter() - started


def measured_rows(max_rows: int) -> list[int]:
    return row_counts(min(max_rows, MOST_ROWS))


def measured_requests(max_requests: int) -> list[int]:
    return doublings(min(max_requests, MOST_DRAFTING))


@dataclass
class _PlainSteps:
    """What steps without drafts take under one load: the machine's pace, on a line that rises with the context that
    they attend to.
    """

    seen: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=NUM_OBSERVED))
    """Positions attended to, and seconds; both over the target's own seconds, as measured at start-up."""
    _fitted: _PlainFit | None = None

    @property
    def is_known(self) -> bool:
        return len(self.seen) >= FEWEST_OBSERVED

    def see(self, own_seconds: float, num_context: int, seconds: float) -> None:
        self.seen.append((num_context / own_seconds, seconds / own_seconds))
        self._fitted = None

    def fit(self) -> _PlainFit:
        """Needs steps."""
        if self._fitted is None:
            context, times = np.array(self.seen).T
            times = np.minimum(times, LONGEST_STEP * np.median(times))
            beyond = context / context.mean() - 1
            share = beyond @ (times / times.mean() - 1) / (beyond @ beyond + CONTEXT_PRIOR)
            share = float(np.clip(share, 0.0, LARGEST_SHARE))
            paces = sliding_window_view(times / (1 + share * beyond), min(NUM_PLAIN_OBSERVED, len(times)))
            # They differ in nothing but the machine's moods, and few of them count.
            pace = np.median(paces, axis=1)
            self._fitted = _PlainFit(float(context.mean()), share, float(pace[-1]), float(pace[-1] / pace.min()))
        return self._fitted


@dataclass(frozen=True)
class _PlainFit:
    mean_context: float
    share: float
    """Of a step with the mean context, what grows with the context."""
    pace: float
    """Of the machine now: seconds of such a step, over the target's own."""
    slowness: float
    """Of the machine now, against its fastest."""

    def times(self, context: Any) -> Any:
        """Seconds over the target's own, elementwise; context: positions over them."""
        return self.pace * (1 + self.share * (context / self.mean_context - 1))


@dataclass
class _Load:
    """What is done under one load, and what was seen of it."""

    drafts: bool = False
    num_left: int = NUM_PLAIN
    """Steps until drafting is judged, or until it is tried."""
    speedup: float | None = None
    """Tokens of the latest steps with drafts over those that decoding without had emitted meanwhile, when they were
    judged.
    """
    seen_factor: float | None = None
    """How many times the target's own seconds a further row has cost in them."""
    worth_by_depth: np.ndarray | None = None
    """[T], tokens that the chosen nodes of each depth bring to a step, less what their rows' time could; a mean over
    the latest steps with all frames.
    """
    num_whole: int = 0
    """Trees that it was learnt from."""
    num_until_whole: int = 0
    """Steps with drafts"""
    least_chosen: float = 0.0
    """psi, a mean over the latest steps with drafts."""
    num_until_look: int = FIRST_LOOK
    """Steps with drafts"""
    look_after: int = FIRST_LOOK
    num_rests: int = 0
    """One after the other."""
    with_drafts: deque[tuple[int, int, int, float, int]] = field(default_factory=lambda: deque(maxlen=NUM_OBSERVED))
    """Requests, positions that they attend to, tokens, seconds and rows of steps."""
    plain: _PlainSteps = field(default_factory=_PlainSteps)

    def rest(self, lost: float) -> None:
        """lost: steps' worth of tokens."""
        longest = LONGEST_REST if self.plain.is_known else SHORTEST_REST
        num_steps = lost / LOST_SHARE * 2**self.num_rests
        self.drafts, self.num_left = False, int(np.clip(num_steps, SHORTEST_REST, longest))
        self.num_rests += 1
        self.num_until_look = self.look_after = FIRST_LOOK
        self.speedup = self.seen_factor = None
        self.with_drafts.clear()

    def look(self) -> None:
        self.drafts, self.num_left, self.num_rests = False, NUM_PLAIN, 0
        self.num_until_look = self.look_after = min(2 * self.look_after, LAST_LOOK)

    def drafted(self) -> np.ndarray | None:
        """[5, n] `with_drafts`, once there are enough of them."""
        if len(self.with_drafts) < FEWEST_OBSERVED:
            return None
        steps = np.array(self.with_drafts).T
        # A step in which the machine stood still says nothing about drafts.
        steps[3] = np.minimum(steps[3], LONGEST_STEP * np.median(steps[3]))
        return steps


class NodeBudget:
    def __init__(
        self, target: Cost, drafting: Cost, num_nodes: int, one_frame: Cost | None = None, num_frames: int = 1
    ) -> None:
        """target: by rows; drafting, one_frame: by requests, with T and with one; num_nodes: the largest N.

        one_frame: None where no frame can be left out, as with a blank, which lets a shallow node stand at a late one.
        """
        self._target, self._drafting, self._num_nodes = target, drafting, num_nodes
        self._one_frame, self._num_frames = one_frame, num_frames
        self._is_whole = True
        """Whether the trees to choose from have all frames."""
        self._loads: dict[int, _Load] = defaultdict(_Load)
        """By the number of bits of the number of requests, those of the busier of two steps."""
        self._num_before = 0
        """Requests of the step before."""
        self._num_context = 0
        """Positions that the requests of the step that ends attend to."""
        self._kind = self._kind_before = (0, False)
        """Load, and whether drafts were made, of the step that ends and of the one before."""
        self._believed = self._accepted = 0.0
        self._profile: np.ndarray | None = None
        """[2, N], psi and depths of a tree's nodes, a mean over the latest trees."""

    def wants_drafts(self, num_requests: int, num_context: int) -> bool:
        """Asked once at the end of each step; num_context: positions that its requests have attended to."""
        # A step with fewer is often followed by one with more: some have ended and others come, or of those that come
        # together one is the first.
        key = max(num_requests, self._num_before).bit_length()
        self._num_before, self._num_context = num_requests, num_context
        load = self._loads[key]
        load.num_left -= 1
        if load.drafts:
            load.num_until_look -= 1
            if load.num_left <= 0:
                load.num_left = NUM_JUDGED
                lost = self._judge(load)
                if lost > 0:
                    load.rest(lost / num_requests)
            elif load.speedup is None and not self._may_pay(load, num_requests):
                # What its drafting took is lost at least.
                spent = (NUM_JUDGED - load.num_left) * float(self._drafting.at(num_requests))
                load.rest(spent / float(self._plain_seconds(load, num_requests, num_context)))
            if load.num_until_look <= 0:
                load.look()
        elif load.num_left <= 0:
            load.drafts = self._may_pay(load, num_requests)
            load.num_left = NUM_JUDGED if load.drafts else SHORTEST_REST
        self._kind_before, self._kind = self._kind, (key, load.drafts)
        return load.drafts

    def _may_pay(self, load: _Load, num_requests: int) -> bool:
        """Whether drafting could pay if its steps took no more than what was measured at start-up takes longer than
        without; on a machine that is slower now than it has been, by as much more.
        """
        if self._profile is None:
            return True
        psi, depths = self._profile
        plain, gains = self._plain_seconds(load, num_requests, self._num_context), self._gains(psi)
        rows = num_requests * np.arange(1, len(gains) + 1)
        num_frames = np.maximum.accumulate(np.concatenate(([1.0], depths)))
        longer = self._target.at(rows) - self._target.at(num_requests) + self._draft_seconds(num_requests, num_frames)
        slowness = load.plain.fit().slowness if load.plain.is_known else 1.0
        return bool(((1 + gains) * plain / (plain + slowness * longer)).max() > LEAST_SPEEDUP)

    def _judge(self, load: _Load) -> float:
        """Learns from the latest steps with drafts. Returns the tokens that they lack, if they surely do; else 0."""
        if (seen := load.drafted()) is None:
            return 0.0
        requests, context, tokens, seconds, rows = seen
        own, plain = self._target.at(requests), self._plain_seconds(load, requests, context)
        without = seconds * requests / plain
        load.speedup = float(tokens.sum() / without.sum())
        own_of_rows = self._target.at(rows)
        prior = FACTOR_PRIOR * (0.1 * own_of_rows.mean()) ** 2
        load.seen_factor = _slope(own_of_rows - own, seconds - plain, _row_factor(plain.sum() / own.sum()), prior)
        losses = LEAST_SPEEDUP * without - tokens
        lost = float(losses.sum())
        return lost if lost > SURE * losses.std() * len(losses) ** 0.5 else 0.0

    def _plain_seconds(self, load: _Load, num_requests: Any, num_context: Any) -> Any:
        """Of a step without drafts, elementwise; if there were nothing but the target, where none has been seen: so it
        is tried where it may be better.
        """
        own = self._target.at(num_requests)
        return own * load.plain.fit().times(num_context / own) if load.plain.is_known else own

    def observe_step(self, num_requests: int, num_tokens: int, seconds: float, num_rows: int) -> None:
        """Of a step of decoding alone, after `wants_drafts` was asked at its end."""
        if self._kind == self._kind_before:
            key, drafts = self._kind
            load = self._loads[key]
            if drafts:
                load.with_drafts.append((num_requests, self._num_context, num_tokens, seconds, num_rows))
            else:
                load.plain.see(float(self._target.at(num_requests)), self._num_context, seconds)

    def observe_walk(self, believed: float, num_accepted: int) -> None:
        """believed: sum of psi over the verified nodes."""
        self._believed = TRUST_DECAY * self._believed + believed
        self._accepted = TRUST_DECAY * self._accepted + num_accepted

    def least_worth(self, num_requests: int) -> float:
        """psi below which a node is not worth building, asked after `num_frames`: that of one that brings half of what
        a row costs, on the way from a step without nodes to one with all of them; or half of the least chosen lately.
        """
        load, most = self._loads[self._kind[0]], num_requests * self._num_nodes
        seconds = self._target.at(num_requests + most) - self._target.at(num_requests)
        worth = self._rate(load, num_requests) * self._factor(load, num_requests) * seconds / most / 2
        worth = float(np.clip(worth, 0.0, MOST_LEFT_OUT))
        return worth if self._is_whole else max(worth, load.least_chosen / 2)

    def num_frames(self, num_requests: int) -> int | None:
        """That are worth drafting, asked once for each drafting; None for all."""
        if self._one_frame is None:
            return None
        load = self._loads[self._kind[0]]
        load.num_until_whole -= 1
        chosen = self._num_frames
        if load.worth_by_depth is not None and load.num_whole >= NUM_WHOLE and load.num_until_whole > 0:
            seconds = self._draft_seconds(num_requests, np.arange(1, self._num_frames + 1))
            worth = load.worth_by_depth.cumsum() - self._rate(load, num_requests) * seconds
            chosen = 1 + int(np.argmax(worth))
        self._is_whole = chosen == self._num_frames
        if self._is_whole:
            load.num_until_whole = WHOLE_AGAIN
        return None if self._is_whole else chosen

    def _draft_seconds(self, num_requests: int, num_frames: np.ndarray) -> np.ndarray:
        """num_frames: of any shape, between 1 and T."""
        every = float(self._drafting.at(num_requests))
        first = every if self._one_frame is None else min(every, float(self._one_frame.at(num_requests)))
        return first + (every - first) * (num_frames - 1) / max(self._num_frames - 1, 1)

    def _rate(self, load: _Load, num_requests: int) -> float:
        """Tokens per second, by which a row's time is judged: the higher one."""
        speedup = load.speedup or 1.0
        if load.plain.is_known:
            speedup = max(speedup, 1.0)
        return speedup * num_requests / float(self._plain_seconds(load, num_requests, self._num_context))

    def _factor(self, load: _Load, num_requests: int) -> float:
        """How many times the target's own seconds a further row costs: as seen, or as expected before."""
        if load.seen_factor is not None:
            return load.seen_factor
        plain = self._plain_seconds(load, num_requests, self._num_context)
        return _row_factor(float(plain / self._target.at(num_requests)))

    def choose(self, probabilities: np.ndarray, num_requests: int, depths: np.ndarray | None = None) -> np.ndarray:
        """Nodes to verify of each tree, [R] int64.

        probabilities: [R, N], psi in descending order, 0 behind a tree's last node; num_requests: those of the batch,
        of which the R draft; depths: [R, N] int64, needed where frames may be left out.
        """
        flat = probabilities.ravel()
        order = np.argsort(-flat, kind="stable")[: np.count_nonzero(flat)]
        load = self._loads[self._kind[0]]
        gains = self._gains(flat[order])
        rows = np.array(row_counts(num_requests + len(order)))
        rows = np.concatenate(([num_requests], rows[rows > num_requests]))
        costs = self._factor(load, num_requests) * (self._target.at(rows) - self._target.at(num_requests))
        price = self._rate(load, num_requests) * costs
        best = np.argmax(gains[rows - num_requests] - price)
        num_chosen = rows[best] - num_requests
        chosen = order[:num_chosen]
        if num_chosen:
            load.least_chosen += (1 - PROFILE_DECAY) * (float(flat[chosen[-1]]) - load.least_chosen)
        if self._is_whole:
            self._learn_profile(probabilities, depths)
            if depths is not None:
                worth = np.diff(gains[: num_chosen + 1]) - price[best] / max(num_chosen, 1)
                self._learn_depths(load, len(probabilities), depths.ravel()[chosen], worth)
        return np.bincount(chosen // probabilities.shape[1], minlength=len(probabilities))

    def _learn_depths(self, load: _Load, num_trees: int, depths: np.ndarray, worth: np.ndarray) -> None:
        """depths, worth: [M]"""
        seen = np.bincount(depths - 1, worth, self._num_frames)
        known = load.worth_by_depth
        load.worth_by_depth = seen if known is None else PROFILE_DECAY * known + (1 - PROFILE_DECAY) * seen
        load.num_whole += num_trees

    def _gains(self, psi: np.ndarray) -> np.ndarray:
        """[n + 1], tokens that the first 0, 1, ... n nodes are expected to bring; psi: [n]."""
        trust = (self._accepted + TRUST_PRIOR) / (self._believed + TRUST_PRIOR)
        return np.concatenate(([0.0], np.minimum(trust * psi, 1.0).cumsum()))

    def _learn_profile(self, probabilities: np.ndarray, depths: np.ndarray | None) -> None:
        seen = np.array((np.zeros(self._num_nodes), np.full(self._num_nodes, self._num_frames, float)))
        num_nodes = probabilities.shape[1]
        seen[0, :num_nodes] = probabilities.mean(0)
        if depths is not None:
            seen[1, :num_nodes] = np.where(probabilities > 0, depths, self._num_frames).mean(0)
        self._profile = seen if self._profile is None else PROFILE_DECAY * self._profile + (1 - PROFILE_DECAY) * seen


def _row_factor(times: float) -> float:
    """times: seconds of a step without drafts, over the target's own. What it takes beyond those is expected to be half
    rows' (attention, the walk) and half the steps' (scheduling, messages).
    """
    return (1 + times) / 2


def _slope(target: np.ndarray, seconds: np.ndarray, expected: float, prior: float) -> float:
    """Of a least-squares line through steps, held near what is expected while they are few or alike."""
    spread = target - target.mean()
    slope = (spread @ (seconds - seconds.mean()) + prior * expected) / (spread @ spread + prior)
    return float(np.clip(slope, 1.0, LARGEST_FACTOR))
