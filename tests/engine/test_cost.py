"""The cost table that is measured at start-up."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from vllm_ctc_spec.engine.adaptive.cost import (
    ALWAYS,
    LONGEST_SWEEP,
    MOST_DRAFTING,
    MOST_ROWS,
    NUM_SWEEPS,
    Cost,
    drafting_sizes,
    measure,
    target_sizes,
    timed,
)
from vllm_ctc_spec.engine.row_counts import row_counts


def constant(seconds: float) -> Callable[[int], float]:
    return lambda size: seconds


def test_cost_is_linear_between_sizes_and_rises_beyond_as_over_the_last_doubling() -> None:
    cost = Cost(np.array([1, 4, 7, 8]), np.array([2.0, 5.0, 8.5, 9.0]))
    np.testing.assert_allclose(cost.at(np.array([1, 2, 4, 8, 9, 18])), [2.0, 3.0, 5.0, 9.0, 10.0, 19.0])


def test_a_falling_cost_is_constant_beyond_the_last_size() -> None:
    assert Cost(np.array([1, 2, 4]), np.array([1.0, 3.0, 2.0])).at(1000) == 2.0


def test_a_table_of_one_size_gives_one_cost() -> None:
    assert Cost(np.array([1]), np.array([3.0])).at(5) == 3.0


def test_fast_steps_are_measured_at_every_row_count() -> None:
    assert measure(constant(0.001), target_sizes(21)).sizes.tolist() == [*range(1, 9), 10, 12, 14, 16, 20, 21]
    assert target_sizes(100_000)[-1] == MOST_ROWS
    assert drafting_sizes(1) == [1] and drafting_sizes(100_000) == [1, 2, 4, 8, 16, 32, MOST_DRAFTING]


@pytest.mark.parametrize("plain", [0.001, 0.3, 0.9, 5.0, 60.0])
def test_slow_steps_are_measured_at_several_sizes(plain: float) -> None:
    cost = measure(lambda size: plain * (1 + 0.01 * (size - 1)), target_sizes(10_000))
    assert set(ALWAYS) <= set(cost.sizes.tolist())
    np.testing.assert_allclose(cost.at(np.array([1, 9, 33, 400])), plain * np.array([1.0, 1.08, 1.32, 4.99]))


def test_the_measurement_takes_a_limited_time() -> None:
    spent = 0.0

    def run(size: int) -> float:
        nonlocal spent
        spent += 0.25
        return 0.25

    measure(run, target_sizes(10_000))
    assert spent <= (1 + NUM_SWEEPS) * (LONGEST_SWEEP + 0.25 * len(ALWAYS))


@pytest.mark.parametrize("seconds", [1e-6, 3.0])
def test_in_lock_step_the_number_of_runs_does_not_depend_on_measured_times(seconds: float) -> None:
    """Engines with different numbers of runs would wait for each other forever."""
    runs: list[int] = []

    def run(size: int) -> float:
        runs.append(size)
        return seconds

    sizes = target_sizes(300)
    measure(run, sizes, in_lock_step=True)
    assert runs == sizes * (1 + NUM_SWEEPS)


def test_the_fastest_run_counts_and_the_first_does_not() -> None:
    """The first run compiles kernels, and others may be slow. A larger size may be faster than a smaller one."""
    seconds = {1: iter([9.0, 0.3, 0.2, 0.4]), 8: iter([0.01, 0.1, 0.1, 0.5])}
    np.testing.assert_allclose(measure(lambda size: next(seconds[size]), [1, 8]).seconds, [0.2, 0.1])


def test_a_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ran = 5.0, []

    def run(size: int) -> None:
        nonlocal now
        now += size / 4
        ran.append(size)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert timed(run)(3) == 0.75 and ran == [3]


@pytest.mark.parametrize("most", [1, 8, 9, 33, 512])
def test_there_are_four_row_counts_in_each_doubling(most: int) -> None:
    counts = row_counts(most)
    assert counts[0] == 1 and counts[-1] == most and counts == sorted(set(counts))
    assert all(larger <= smaller * 1.25 or larger == smaller + 1 for smaller, larger in itertools.pairwise(counts))
    assert len(counts) <= 8 + 4 * max(0.0, np.log2(most / 8)) + 1
    grid = [*range(1, 8), *(eighths << power for power in range(10) for eighths in (8, 10, 12, 14))]
    assert counts[:-1] == [count for count in grid if count < most]
