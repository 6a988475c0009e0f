from __future__ import annotations

from collections.abc import Sequence

import pytest

from vllm_ctc_spec.bench.equality import Equality, first_difference, judge
from vllm_ctc_spec.bench.records import Branching

PROMPTS = [(1,), (2,), (3,)]
PLAIN = [(5, 6, 7), (5, 6), (9,)]


def verdict(
    *rounds: list[tuple[int, ...]], gap: float | None = None, near_tie: float | None = None, is_promised: bool = True
) -> Equality:
    def ask(branchings: Sequence[Branching]) -> list[float | None]:
        return [gap for _ in branchings]

    return judge(PROMPTS, PLAIN, rounds, near_tie, ask, is_promised)


@pytest.mark.parametrize(
    ("plain", "other", "expected"),
    [
        ((1, 2), (1, 2), None),
        ((1, 2), (1, 3), 1),
        ((1, 2), (1,), 1),
        ((1,), (1, 2), 1),
        ((), (), None),
        ((4,), (5,), 0),
    ],
)
def test_first_difference(plain: tuple[int, ...], other: tuple[int, ...], expected: int | None):
    assert first_difference(plain, other) == expected


def test_the_same_tokens_are_identical():
    same = verdict(PLAIN, PLAIN)
    assert (same.identical, same.near_tie, same.different, same.exact, same.differences) == (3, 0, 0, True, ())


def test_one_round_that_differs_counts():
    found = verdict(PLAIN, [(5, 8, 7), *PLAIN[1:]])
    assert (found.identical, found.different, found.exact) == (2, 1, False)
    assert [(each.prompt, each.position) for each in found.differences] == [(0, 1)]


def test_a_small_gap_excuses_only_where_gaps_are_asked():
    other = [(5, 8, 7), *PLAIN[1:]]
    tied = verdict(other, gap=0.05, near_tie=0.1)
    assert (tied.identical, tied.near_tie, tied.different, tied.exact, tied.differences) == (2, 1, 0, True, ())
    assert verdict(other, gap=0.1, near_tie=0.1).exact is False
    assert verdict(other, gap=None, near_tie=0.1).exact is False
    assert verdict(other, gap=0.0, near_tie=None).exact is False


def test_a_prompt_counts_by_its_worst_answer():
    gaps = iter([0.01, 5.0])
    rounds = [[(5, 8), *PLAIN[1:]], [(4, 6), *PLAIN[1:]]]
    found = judge(PROMPTS, PLAIN, rounds, 0.1, lambda branchings: [next(gaps) for _ in branchings], True)
    assert (found.identical, found.near_tie, found.different) == (2, 0, 1)


def test_an_answer_that_ends_early_is_no_near_tie():
    assert verdict([(5, 6), *PLAIN[1:]], gap=0.0, near_tie=0.1).exact is False


def test_the_gap_is_asked_after_the_shared_text():
    asked: list[Branching] = []

    def ask(branchings: Sequence[Branching]) -> list[float | None]:
        asked.extend(branchings)
        return [0.0] * len(branchings)

    judge(PROMPTS, PLAIN, [[(5, 8, 7), (5, 6), (9,)]], 0.1, ask, True)
    assert asked == [Branching((1, 5), 6, 8)]


def test_what_is_not_promised_is_counted_and_not_judged():
    found = verdict([(4,), *PLAIN[1:]], is_promised=False)
    assert (found.different, found.exact) == (1, None)
