"""The adaptive budget: its speed on synthetic machines, and its choice of nodes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.budget_simulation import (
    CASES,
    FLAT,
    GOOD,
    LINEAR,
    LONG,
    NUM_FIRST,
    NUM_NODES,
    RISING,
    USELESS,
    USELESS_OVERCONFIDENT,
    Case,
    Drafter,
    Machine,
    fixed_speedups,
    simulate,
)
from vllm_ctc_spec.engine.adaptive.budget import DraftPlan, NodeBudget, StepOutcome
from vllm_ctc_spec.engine.adaptive.cost import Cost
from vllm_ctc_spec.engine.row_counts import row_counts

FREE = Cost(np.array([1]), np.array([0.0]))


def line(slope: float, drafting: Cost = FREE) -> NodeBudget:
    """For a target whose first row takes a second, and each further row `slope` seconds."""
    return NodeBudget(Cost(np.array([1, 64]), np.array([1.0, 1.0 + 63 * slope])), drafting)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_budget_is_within_three_percent_of_the_best_fixed_tree_and_of_plain_decoding(case: Case) -> None:
    """Of the best tree after the first steps; of plain decoding in any thousand steps."""
    run = simulate(case)
    assert run.speedup(NUM_FIRST) >= 0.97 * fixed_speedups(case)[0].max()
    assert run.worst >= 0.97


@pytest.mark.parametrize("plain_seconds", [1e-4, 0.03, 0.45, 0.8, 20.0])
def test_where_rows_cost_nothing_all_nodes_are_verified_at_any_scale(plain_seconds: float) -> None:
    machine = Machine("free", plain_seconds, row=0.0, row_overhead=0.0, noise=0.0)
    nodes = simulate(Case(machine, GOOD, "1")).nodes[NUM_FIRST:]
    assert np.median(nodes) == NUM_NODES


def test_where_a_row_costs_nearly_a_step_only_nearly_certain_nodes_are_verified() -> None:
    """A row takes 0.9 of a plain step, at one token per second."""
    trees = [[0.99, 0.97, 0.89, 0.5], [0.8, 0.1]]
    assert line(0.9).choose(DraftPlan(2, 1.0, 0.0), trees) == [2, 0]
    assert simulate(Case(LINEAR, GOOD, "4")).nodes[NUM_FIRST:].mean() < 0.1


@pytest.mark.parametrize("machine", [FLAT, RISING, LINEAR, LONG], ids=lambda machine: machine.name)
@pytest.mark.parametrize("drafter", [USELESS, USELESS_OVERCONFIDENT], ids=lambda drafter: drafter.name)
@pytest.mark.parametrize("draft", [0.15, 1.0])
def test_drafting_pauses_with_a_useless_drafter(machine: Machine, drafter: Drafter, draft: float) -> None:
    """Only trials cost time."""
    run = simulate(Case(dataclasses.replace(machine, draft=draft), drafter, "1"))
    drafted = run.without > run.tokens
    assert 0 < drafted[:NUM_FIRST].sum() < 0.15 * NUM_FIRST
    assert drafted[NUM_FIRST:].sum() < 0.1 * NUM_FIRST
    lost = run.without - run.tokens
    assert lost[:NUM_FIRST].sum() < 0.02 * NUM_FIRST and lost[NUM_FIRST:].sum() < 0.015 * NUM_FIRST


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), min_size=1, max_size=3),
    st.floats(0.0, 0.5),
    st.floats(0.1, 2.0),
    st.floats(0.0, 0.2),
)
def test_no_other_choice_of_nodes_gains_more_at_the_current_rate(
    trees: list[list[float]], slope: float, rate: float, node_seconds: float
) -> None:
    trees = [sorted(tree, reverse=True) for tree in trees]
    num_requests = len(trees)

    def worth(counts: list[int]) -> float:
        expected = sum(sum(tree[:count]) for tree, count in zip(trees, counts))
        return expected - rate * (slope + node_seconds) * sum(counts)

    every = np.stack(np.meshgrid(*(range(len(tree) + 1) for tree in trees)), -1).reshape(-1, num_requests)
    kept = [num_requests, *row_counts(num_requests + sum(map(len, trees)))]
    every = every[np.isin(num_requests + every.sum(1), kept)]
    chosen = line(slope).choose(DraftPlan(num_requests, rate, node_seconds), trees)
    assert worth(chosen) == pytest.approx(max(map(worth, every.tolist())))


def test_prefix_probabilities_are_corrected_by_acceptance() -> None:
    trees, plan = [[0.9, 0.8, 0.7]], DraftPlan(1, 1.0, 0.0)
    budget = line(0.5)
    assert budget.choose(plan, trees) == [3]
    for _ in range(100):
        budget.observe(StepOutcome(1, True, 3, 0, 2.4, seconds=None))
    assert budget.choose(plan, trees) == [0]


def decode(budget: NodeBudget, num_requests: int, count: int, times: float, tree: list[float] | None = None) -> int:
    """A plain step takes a second. A step with nodes takes `times` seconds and accepts one node per request.

    Returns the number of steps that drafted.
    """
    drafted, num_nodes = 0, 0
    for _ in range(count):
        plan = budget.plan(num_requests)
        num_accepted, seconds = (num_requests, times) if num_nodes else (0, 1.0)
        budget.observe(StepOutcome(num_requests, plan is not None, num_nodes, num_accepted, num_accepted, seconds))
        trees = [tree or [1.0]] * num_requests
        num_nodes = 0 if plan is None else sum(budget.choose(plan, trees))
        drafted += plan is not None
    return drafted


def test_each_load_is_judged_separately() -> None:
    budget = line(0.0)
    assert decode(budget, 64, 500, times=3.0) < 50
    assert decode(budget, 1, 500, times=1.1) > 400
    assert decode(budget, 64, 100, times=3.0) == 0
    assert decode(budget, 1, 100, times=1.1) > 80


def test_drafting_resumes_when_it_is_faster_again() -> None:
    budget = line(0.0)
    assert decode(budget, 1, 500, times=3.0) < 50
    assert decode(budget, 1, 3000, times=1.1) > 1000
    assert decode(budget, 1, 500, times=1.1) > 450


def test_interrupted_steps_do_not_pause_drafting() -> None:
    """One step in fifty takes 300 times as long."""
    budget, drafted = line(0.0), 0
    for step in range(5000):
        plan = budget.plan(1)
        drafted += plan is not None
        seconds = 300.0 if step % 50 == 0 else 1.0
        budget.observe(StepOutcome(1, plan is not None, int(plan is not None), int(plan is not None), 1.0, seconds))
    assert drafted > 0.9 * 5000


def test_steps_of_unknown_duration_are_not_compared() -> None:
    budget = line(0.0)
    for _ in range(1000):
        budget.observe(StepOutcome(1, False, 0, 0, 0.0, seconds=None))
        assert budget.plan(1) is None
    assert decode(budget, 1, 100, times=1.1) > 80


def test_the_cost_of_a_node_beyond_the_table_is_estimated() -> None:
    """By the table a node takes 0.05 of a plain step; in fact it takes 0.05 or 0.15."""
    prices = []
    for slope in (0.05, 0.15):
        budget, rng = line(0.05), np.random.default_rng(0)
        num_nodes = 0
        for _ in range(600):
            plan = budget.plan(1)
            # Enough tokens that drafting is faster.
            accepted = 3 if num_nodes else 0
            budget.observe(StepOutcome(1, plan is not None, num_nodes, accepted, accepted, 1 + slope * num_nodes))
            num_nodes = 0
            if plan is not None:
                num_nodes, price = int(rng.integers(1, 20)), plan.node_seconds
        prices.append(price)
    assert prices == pytest.approx([0.0, 0.1], abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("poc"), st.integers(1, 5), st.floats(0.01, 9.0)), max_size=80))
def test_calls_may_come_in_any_order(calls: list[tuple[str, int, float]]) -> None:
    budget, plan = line(0.1), DraftPlan(3, 1.0, 0.0)
    for call, number, seconds in calls:
        if call == "p":
            plan = budget.plan(number) or plan
        elif call == "o":
            budget.observe(StepOutcome(number, number % 2 == 0, number, number // 2, number / 2, seconds))
        else:
            [*counts] = budget.choose(plan, [[0.9, 0.5], [], [0.2]])
            assert len(counts) == 3 and counts[1] == 0 and 0 <= counts[0] <= 2 and 0 <= counts[2] <= 1


@pytest.mark.parametrize(("gain", "pays"), [(0.0, False), (0.79, False), (0.81, True)])
def test_the_drafter_runs_where_its_expected_tokens_are_worth_its_time(gain: float, pays: bool) -> None:
    """Drafting for four requests takes 0.4 seconds, in which the engine emits 0.8 tokens."""
    budget = line(0.1, Cost(np.array([1, 4]), np.array([0.1, 0.4])))
    assert budget.should_draft(DraftPlan(4, 2.0, 0.0), gain) == pays


def test_a_step_without_the_drafter_does_not_count_its_time() -> None:
    """The nodes gain more than their rows cost; with the drafter's time the steps lose."""
    lost = {}
    for asks in (True, False):
        budget = line(0.1, Cost(np.array([1]), np.array([5.0])))
        for _ in range(20):
            budget.choose(DraftPlan(1, 1.0, 0.0, asks), [[0.9, 0.8]])
        lost[asks] = budget._loads[1].loses_by_estimate
    assert lost == {True: True, False: False}
