"""The nodes that pay, against every other choice; and that the engine's answers do not depend on them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from tests.engine.conftest import NUM_PROMPTS, complete, engine, seeded
from tests.engine.probe import record_trees, recorded_trees
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine.budget import (
    FIRST_LOOK,
    LARGEST_FACTOR,
    LAST_LOOK,
    LEAST_SPEEDUP,
    LONGEST_REST,
    LOST_SHARE,
    MOST_DRAFTING,
    MOST_ROWS,
    NUM_JUDGED,
    NUM_PLAIN,
    NUM_WHOLE,
    SHORTEST_REST,
    WHOLE_AGAIN,
    Cost,
    NodeBudget,
    measure,
    measured_requests,
    measured_rows,
)
from vllm_ctc_spec.engine.row_counts import row_counts

FLAT = Cost(np.array([1, 64]), np.array([1.0, 1.0]))
FREE = Cost(np.array([1]), np.array([0.0]))
STEEP = Cost(np.array([1, 64]), np.array([1.0, 64.0]))

CONTEXT = 100
"""Positions of each request, where nothing depends on them."""


def test_cost_is_linear_between_measurements_and_in_proportion_beyond() -> None:
    cost = Cost(np.array([1, 3]), np.array([2.0, 4.0]))
    np.testing.assert_allclose(cost.at(np.array([1, 2, 3, 6])), [2.0, 3.0, 4.0, 8.0])


def test_cost_is_measured_at_every_number_of_rows_that_is_chosen() -> None:
    seen: list[int] = []
    cost = measure(seen.append, measured_rows(21))
    assert cost.sizes.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 21] == sorted(set(seen))
    assert (cost.seconds > 0).all()
    assert measured_rows(100_000)[-1] == MOST_ROWS
    assert measured_requests(1) == [1] and measured_requests(100_000) == [1, 2, 4, 8, 16, 32, MOST_DRAFTING]


def test_a_larger_size_that_is_faster_is_measured_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a slow size counted for all above it, their rows would seem to be free."""
    now = 0.0

    def run(size: int) -> None:
        nonlocal now
        now += {1: 0.2, 2: 0.3, 4: 0.1, 8: 0.15}[size]

    monkeypatch.setattr("time.perf_counter", lambda: now)
    np.testing.assert_allclose(measure(run, [1, 2, 4, 8]).seconds, [0.2, 0.3, 0.1, 0.15])


def test_the_fastest_run_counts_and_no_size_is_run_again_after_two_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every start of a server would take the time of all runs."""
    now = 0.0
    seconds = {1: iter([0.4, 0.1, 0.2, 0.104]), 2: iter([0.9, 0.2, 0.2]), 4: iter([0.5, 0.4, 0.3, 0.2, 0.1])}

    def run(size: int) -> None:
        nonlocal now
        now += next(seconds[size])

    monkeypatch.setattr("time.perf_counter", lambda: now)
    np.testing.assert_allclose(measure(run, [1, 2, 4]).seconds, [0.1, 0.2, 0.1])
    assert [len(list(left)) for left in seconds.values()] == [0, 0, 0]


def test_larger_sizes_than_one_that_takes_long_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert measure(lambda size: None, [1, 2, 4]).sizes.tolist() == [1]


@pytest.mark.parametrize("most", [1, 8, 9, 33, 512])
def test_there_are_four_row_counts_in_each_doubling(most: int) -> None:
    counts = row_counts(most)
    assert counts[0] == 1 and counts[-1] == most and counts == sorted(set(counts))
    assert all(larger <= smaller * 1.25 or larger == smaller + 1 for smaller, larger in itertools.pairwise(counts))
    assert len(counts) <= 8 + 4 * max(0.0, np.log2(most / 8)) + 1
    grid = [*range(1, 8), *(eighths << power for power in range(10) for eighths in (8, 10, 12, 14))]
    assert counts[:-1] == [count for count in grid if count < most]


def budget_of(target: Cost, drafting: Cost = FREE, one_frame: Cost | None = None) -> NodeBudget:
    return NodeBudget(target, drafting, 8, one_frame, num_frames=4)


def observe(budget: NodeBudget, num_requests: int, drafts: bool, tokens: int, seconds: float, rows: int = 8) -> None:
    """A step after another of its kind."""
    budget._num_context = CONTEXT * num_requests
    budget._kind = budget._kind_before = num_requests.bit_length(), drafts
    budget.observe_step(num_requests, tokens, seconds, rows)


def test_where_rows_cost_nothing_all_nodes_are_verified() -> None:
    probabilities = np.array([[0.9, 0.5, 0.1], [0.3, 0.2, 0.0]])
    assert budget_of(FLAT).choose(probabilities, 2).tolist() == [3, 2]


def test_where_rows_cost_more_than_they_bring_none_is() -> None:
    assert budget_of(STEEP).choose(np.array([[0.9, 0.5]]), 1).tolist() == [0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), min_size=1, max_size=3),
    st.floats(0.0, 0.5),
    st.floats(0.1, 2.0),
)
def test_no_other_choice_brings_more_at_the_rate_seen(trees: list[list[float]], slope: float, rate: float) -> None:
    probabilities = np.zeros((len(trees), max(map(len, trees))))
    for row, tree in zip(probabilities, trees):
        row[: len(tree)] = sorted(tree, reverse=True)
    cost = Cost(np.array([1, 16]), np.array([1.0, 1.0 + 15 * slope]))
    budget, num_requests = budget_of(cost), len(trees)
    for _ in range(4):
        observe(budget, num_requests, True, 100, 100 / rate)
    budget._judge(budget._loads[num_requests.bit_length()])

    def worth(counts: np.ndarray) -> float:
        expected = sum(row[:count].sum() for row, count in zip(probabilities, counts))
        return float(expected - rate * (cost.at(num_requests + counts.sum()) - cost.at(num_requests)))

    every = np.stack(np.meshgrid(*(range(len(tree) + 1) for tree in trees)), -1).reshape(-1, len(trees))
    kept = [num_requests, *row_counts(num_requests + sum(map(len, trees)))]
    every = every[np.isin(num_requests + every.sum(1), kept)]
    chosen = worth(budget.choose(probabilities, num_requests))
    assert chosen == pytest.approx(max(map(worth, every)))


TREES = np.array([[0.9, 0.8, 0.3, 0.1, 0.05]] * 2), np.array([[1, 2, 3, 4, 1]] * 2)
"""psi and depths of two trees, of which a frame brings 1.9, 1.6, 0.6 and 0.2 tokens."""


@pytest.mark.parametrize(("frame_seconds", "expected"), [(0.02, None), (0.15, 3), (0.4, 2), (1.0, 1)])
def test_frames_are_drafted_that_bring_more_than_their_time_could(frame_seconds: float, expected: int | None) -> None:
    """Two tokens a second without them."""
    drafting, one_frame = (Cost(np.array([2]), np.array([0.5 + more])) for more in (3 * frame_seconds, 0.0))
    budget = budget_of(FLAT, drafting, one_frame)
    for _ in range(NUM_WHOLE // 2):
        assert budget.num_frames(2) is None
        budget.choose(TREES[0], 2, TREES[1])
    chosen = [budget.num_frames(2) for _ in range(2 * WHOLE_AGAIN)]
    whole = [step for step, num_frames in enumerate(chosen) if num_frames is None]
    assert whole == [WHOLE_AGAIN - 1, 2 * WHOLE_AGAIN - 1] or (expected is None and len(whole) == len(chosen))
    assert set(chosen) == {expected, None}


def test_frames_are_left_out_only_where_they_can_be() -> None:
    budget = budget_of(FLAT, Cost(np.array([2]), np.array([100.0])))
    for _ in range(NUM_WHOLE):
        assert budget.num_frames(2) is None
        budget.choose(TREES[0], 2, TREES[1])


def test_of_fewer_frames_no_more_nodes_are_built_than_were_worth_it_lately() -> None:
    budget = budget_of(FLAT, Cost(np.array([2]), np.array([10.0])), Cost(np.array([2]), np.array([1.0])))
    for _ in range(NUM_WHOLE):
        budget.choose(TREES[0], 2, TREES[1])
    assert budget.num_frames(2) is None and budget.least_worth(2) == 0.0
    while budget.num_frames(2) is None:
        pass
    assert 0.0 < budget.least_worth(2) < TREES[0].min()


def test_frames_that_can_be_left_out_let_drafting_pay() -> None:
    """A plain step takes a second, a tree's first two frames half of one, all of them three."""
    drafting, one_frame = Cost(np.array([2]), np.array([3.0])), Cost(np.array([2]), np.array([0.0]))
    for first, pays in ((None, False), (one_frame, True)):
        budget = budget_of(FLAT, drafting, first)
        budget.choose(TREES[0], 2, TREES[1])
        assert budget._may_pay(budget._loads[2], 2) == pays


@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1, 10.0])
def test_what_is_not_worth_building_is_not_chosen(slope: float) -> None:
    budget = budget_of(Cost(np.array([1, 64]), np.array([1.0, 1.0 + 63 * slope])))
    assert (budget.least_worth(2) > 0.0) == (slope > 0.0)
    psi = np.array([0.95, 0.5, 0.3, 0.1, 0.04, 0.02, 0.01, 0.003])
    chosen = budget.choose(np.stack((psi, psi)), 2)
    assert all(psi[:count].min(initial=1.0) >= budget.least_worth(2) for count in chosen)
    assert budget.least_worth(2) < psi[3]


def test_belief_is_weighed_by_what_was_accepted() -> None:
    cost = Cost(np.array([1, 8]), np.array([1.0, 4.5]))
    probabilities = np.array([[0.9, 0.8, 0.7]])
    assert budget_of(cost).choose(probabilities, 1).sum() > 0
    disappointed = budget_of(cost)
    for _ in range(100):
        disappointed.observe_walk(2.4, 0)
    assert disappointed.choose(probabilities, 1).sum() == 0


def steps(budget: NodeBudget, num_requests: int, count: int, with_drafts: float, without: float) -> list[bool]:
    """Steps whose seconds depend on whether drafts are made; a token for each request either way."""
    kinds = []
    for _ in range(count):
        kinds.append(budget.wants_drafts(num_requests, CONTEXT * num_requests))
        budget.observe_step(num_requests, num_requests, with_drafts if kinds[-1] else without, num_requests)
    return kinds


def runs(kinds: list[bool]) -> list[tuple[bool, int]]:
    return [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]


@pytest.mark.parametrize("slower", [1.05, 1.5, 3.0, 100.0])
def test_drafting_that_does_not_pay_is_tried_at_the_price_of_a_small_share(slower: float) -> None:
    kinds = steps(budget_of(FLAT), 4, 20_000, slower, 1.0)
    lost = sum(kinds) * (slower - 1)
    assert any(kinds[-LONGEST_REST - NUM_JUDGED :])
    assert lost <= max(LOST_SHARE, NUM_JUDGED * (slower - 1) / LONGEST_REST) * len(kinds) * 1.3
    rests = [length for drafts, length in runs(kinds)[1:-1] if not drafts]
    assert min(rests) >= SHORTEST_REST and max(rests) <= LONGEST_REST


def test_drafting_that_pays_goes_on_and_is_compared_again_ever_more_rarely() -> None:
    kinds = steps(budget_of(FLAT), 1, 5000, 0.5, 1.0)
    drafted = [length for drafts, length in runs(kinds) if drafts][:-1]
    assert drafted[:5] == [FIRST_LOOK << doublings for doublings in range(4)] + [LAST_LOOK]
    assert set(drafted[5:]) == {LAST_LOOK}
    assert {length for drafts, length in runs(kinds)[2:-1] if not drafts} == {NUM_PLAIN}


def test_drafting_that_only_a_slow_machine_made_pay_ends_at_a_look() -> None:
    budget = budget_of(FLAT)
    assert all(steps(budget, 1, NUM_PLAIN + 20, 2.0, 3.0)[NUM_PLAIN:])
    assert sum(steps(budget, 1, 1000, 2.0, 1.0)) < 100


def test_a_few_unlucky_steps_do_not_end_what_pays() -> None:
    budget, rng = budget_of(FLAT), np.random.default_rng(0)
    drafted = 0
    for _ in range(20_000):
        drafts = budget.wants_drafts(1, CONTEXT)
        drafted += drafts
        # 2.5 tokens a step on average, for the time of two.
        budget.observe_step(1, 1 + int(rng.binomial(6, 0.25)) if drafts else 1, 2.0 if drafts else 1.0, 8)
    assert drafted > 0.9 * 20_000


@pytest.mark.parametrize(("gain", "pays"), [(0.98, False), (1.02, True)])
def test_steps_pay_that_are_faster_by_a_margin(gain: float, pays: bool) -> None:
    kinds = steps(budget_of(FLAT), 1, 5000, 1 / (gain * LEAST_SPEEDUP), 1.0)
    assert (sum(kinds) > 0.8 * len(kinds)) == pays and (sum(kinds) < 0.2 * len(kinds)) != pays


def test_steps_are_compared_with_those_of_as_many_requests() -> None:
    """Twice as fast with drafts as without, with four requests as with seven."""
    budget = budget_of(FLAT)
    for _ in range(200):
        for num_requests in (4, 4, 4, 7, 4, 7, 7, 7):
            drafts = budget.wants_drafts(num_requests, CONTEXT * num_requests)
            budget.observe_step(num_requests, num_requests, 0.5 if drafts else 1.0, num_requests)
    assert budget._loads[3].speedup == pytest.approx(2.0)
    assert budget._rate(budget._loads[3], 4) == pytest.approx(8.0)
    assert budget._rate(budget._loads[3], 7) == pytest.approx(14.0)


def test_steps_are_compared_with_those_of_as_long_a_context() -> None:
    """Twice as fast with drafts as without, while attention makes a step three times as long again and again."""
    budget = budget_of(FLAT)
    speedups = set()
    for step in range(4000):
        num_context = 100 + step % 300
        drafts = budget.wants_drafts(1, num_context)
        budget.observe_step(1, 2 if drafts else 1, 0.5 + num_context / 100, 1)
        if step > 2000 and drafts:
            speedups.add(budget._loads[1].speedup)
    assert len(speedups) > 10 and all(speedup == pytest.approx(2.0, rel=0.1) for speedup in speedups)
    assert float(budget._plain_seconds(budget._loads[1], 1, 300)) == pytest.approx(3.5, rel=0.1)


def test_a_machine_that_stands_still_for_a_step_does_not_end_what_pays() -> None:
    budget = budget_of(FLAT)
    kinds = []
    for step in range(20_000):
        kinds.append(budget.wants_drafts(1, CONTEXT))
        seconds = 0.6 if kinds[-1] else 1.0
        budget.observe_step(1, 1, 300 * seconds if step % 50 == 0 else seconds, 1)
    assert sum(kinds) > 0.9 * len(kinds)


def test_rows_cost_what_steps_have_shown() -> None:
    """Seconds grow three times as fast with the rows as the target's own, and then as fast."""
    cost = Cost(np.array([1, 64]), np.array([1.0, 4.15]))
    learnt, naive = budget_of(cost), budget_of(cost)
    for rows in [2, 8, 14, 20] * 16:
        observe(learnt, 1, True, 2, 1 + 0.15 * rows, rows)
        observe(naive, 1, True, 2, 1 + 0.05 * rows, rows)
    for budget in (learnt, naive):
        budget._judge(budget._loads[1])
    assert 2.5 < learnt._factor(learnt._loads[1], 1) < 3.1 < LARGEST_FACTOR
    assert naive._factor(naive._loads[1], 1) == pytest.approx(1.0)
    probabilities = np.array([[0.9, 0.5, 0.3, 0.1, 0.07]])
    assert learnt.choose(probabilities, 1) < naive.choose(probabilities, 1)


def test_rows_count_once_where_all_steps_had_as_many() -> None:
    budget, rng = budget_of(STEEP), np.random.default_rng(0)
    for _ in range(50):
        observe(budget, 1, True, 2, float(rng.uniform(5, 9)), 8)
    budget._judge(budget._loads[1])
    assert budget._factor(budget._loads[1], 1) == 1.0


def test_decoding_without_drafts_is_tried_where_it_might_be_faster() -> None:
    """It has not been seen, because requests came and went."""
    budget = budget_of(Cost(np.array([1, 64]), np.array([0.1, 0.1])))
    for _ in range(NUM_PLAIN - 1):
        assert not budget.wants_drafts(1, CONTEXT)
    first, rest, then, *_ = runs(steps(budget, 1, 100, 0.5, 1.0))
    assert (first, rest, then) == ((True, NUM_JUDGED), (False, SHORTEST_REST), (True, FIRST_LOOK))


def test_drafting_is_taken_up_again_when_it_pays_again() -> None:
    budget = budget_of(FLAT)
    assert not all(steps(budget, 1, 200, 2.0, 1.0)[NUM_PLAIN:])
    # Not at a look.
    assert all(steps(budget, 1, 5200, 0.5, 1.0)[-200:])


def test_drafting_that_cannot_pay_is_not_tried_once_it_is_known_what_trees_are_worth() -> None:
    """The target and drafting take a second for each request: only three tokens a step would make up for that."""
    budget = budget_of(STEEP, STEEP)
    assert sum(steps(budget, 4, NUM_PLAIN, 10.0, 4.0)) == 1
    budget.choose(np.full((4, 4), 0.1), 4)
    assert not any(steps(budget, 4, 10_000, 1.0, 4.0))
    assert not any(steps(budget, 16, 10_000, 1.0, 16.0))


def test_a_machine_that_is_slower_for_a_while_does_not_make_drafting_look_payable() -> None:
    """At a third of its speed a plain step takes so long that, by what was measured at start-up, drafts would pay."""
    budget = budget_of(STEEP, STEEP)
    budget.choose(np.array([[0.9] * 4 + [0.0] * 4]), 4)
    assert not any(steps(budget, 4, NUM_PLAIN + 200, 1.0, 4.0))
    assert not any(steps(budget, 4, 200, 1.0, 12.0))
    unaware = budget_of(STEEP, STEEP)
    unaware.choose(np.array([[0.9] * 4 + [0.0] * 4]), 4)
    assert any(steps(unaware, 4, 200, 1.0, 12.0))


def test_more_requests_under_one_load_are_no_faster_machine() -> None:
    """Seven emit more tokens per second than four; were four a slower machine, drafts could not pay for them."""
    budget = budget_of(FLAT, Cost(np.array([1, 64]), np.array([2.5, 2.5])))
    budget.choose(np.array([[0.9] * 4 + [0.0] * 4]), 7)
    for num_requests in [7] * NUM_PLAIN + [4] * NUM_PLAIN:
        observe(budget, num_requests, False, num_requests, 1.0, num_requests)
    assert budget._may_pay(budget._loads[3], 4)


def test_a_try_that_ends_as_soon_as_trees_are_known_rests_for_what_its_drafting_took() -> None:
    budget = budget_of(STEEP, STEEP)
    assert sum(steps(budget, 4, NUM_PLAIN, 10.0, 4.0)) == 1
    budget.choose(np.full((4, 4), 0.1), 4)
    assert not budget.wants_drafts(4, CONTEXT * 4)
    # One drafting of four seconds, at a token in each.
    assert budget._loads[3].num_left == pytest.approx(4 / (LOST_SHARE * 4))


def test_each_rest_after_another_is_twice_as_long() -> None:
    rests = [length for drafts, length in runs(steps(budget_of(FLAT), 1, 30_000, 1.2, 1.0))[1:-1] if not drafts]
    ratios = [after / before for before, after in itertools.pairwise(rests)]
    assert len(ratios) > 4 and ratios[:-1] == pytest.approx([2.0] * (len(ratios) - 1), rel=0.05)
    assert rests[-1] == LONGEST_REST


def test_a_rest_under_one_load_is_none_under_another() -> None:
    budget = budget_of(FLAT)
    steps(budget, 64, 30, 2.0, 1.0)
    assert steps(budget, 1, NUM_PLAIN + 6, 0.5, 1.0)[NUM_PLAIN + 1 :] == [True] * 5
    assert not any(steps(budget, 64, 5, 2.0, 1.0))


def test_a_step_with_fewer_requests_among_others_is_no_load_of_its_own() -> None:
    budget = budget_of(FLAT)
    steps(budget, 1, NUM_PLAIN + 5, 0.5, 1.0)
    steps(budget, 64, 30, 2.0, 1.0)
    for _ in range(20):
        assert not any(steps(budget, 1, 1, 0.5, 1.0) + steps(budget, 64, 2, 2.0, 1.0))
    assert steps(budget, 1, 3, 0.5, 1.0) == [False, True, True]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_do_not_depend_on_the_budget(
    plain: object, adaptive: object, prompts: list[list[int]], temperature: float
) -> None:
    params = seeded(NUM_PROMPTS, temperature=temperature, max_tokens=60)
    assert complete(adaptive, prompts, params) == complete(plain, prompts, params)
    alone = SamplingParams(temperature=temperature, seed=5, max_tokens=60)
    for prompt in prompts[:4]:
        assert complete(adaptive, [prompt], alone) == complete(plain, [prompt], alone)


def test_answers_do_not_depend_on_the_frames_that_are_drafted(
    pair: TinyPair, plain: object, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    params = seeded(NUM_PROMPTS, temperature=0.8, max_tokens=40)
    with engine(pair, {"adaptive_budget": True}) as llm:
        llm.collective_rpc(draft_with_few_frames)
        llm.collective_rpc(record_trees)
        assert complete(llm, prompts, params) == complete(plain, prompts, params)
        [recorded] = llm.collective_rpc(recorded_trees)
    assert {max(each.tree.depths) for each in recorded} == {1, 2}


def draft_with_few_frames(worker: Any) -> None:
    budget = worker.model_runner.budget
    budget.wants_drafts = lambda num_requests, num_context: True
    asked = itertools.count()
    budget.num_frames = lambda num_requests: 1 + next(asked) % 2


@pytest.fixture(scope="module")
def adaptive(pair: TinyPair):
    with engine(pair, {"adaptive_budget": True}) as llm:
        yield llm
