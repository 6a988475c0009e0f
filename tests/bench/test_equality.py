from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from vllm_ctc_spec.bench.equality import Equality, first_difference, gap_between, is_near_tie, judge, logit_step
from vllm_ctc_spec.bench.records import Branching, Gap

PROMPTS = [(1,), (2,), (3,)]
PLAIN = [(5, 6, 7), (5, 6), (9,)]
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def verdict(
    *rounds: list[tuple[int, ...]],
    gap: Gap | None = None,
    dtype: torch.dtype = BFLOAT16,
    is_greedy: bool = True,
    is_promised: bool = True,
) -> Equality:
    def ask(branchings: Sequence[Branching]) -> list[Gap | None]:
        return [gap for _ in branchings]

    return judge(PROMPTS, PLAIN, rounds, dtype, ask if is_greedy else None, is_promised)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("top_logit", [-33.5, -0.75, 0.3, 1.0, 15.875, 16.0, 31.875, 32.0])
def test_a_step_leads_to_the_next_number_of_the_type(top_logit: float, dtype: torch.dtype):
    value = torch.tensor(top_logit, dtype=dtype)
    away = torch.nextafter(value, torch.tensor(torch.inf if top_logit > 0 else -torch.inf, dtype=dtype))
    assert logit_step(value.item(), dtype) == (away - value).abs().item()


def test_two_steps_at_the_top_logit_are_a_near_tie():
    assert is_near_tie(0.25, 31.9, BFLOAT16) and not is_near_tie(0.375, 31.9, BFLOAT16)
    assert is_near_tie(0.5, 32.0, BFLOAT16) and not is_near_tie(0.75, 32.0, BFLOAT16)
    assert is_near_tie(0.03125, 31.9, torch.float16) and not is_near_tie(0.25, 31.9, torch.float16)
    assert not is_near_tie(0.0, 31.9, FLOAT32)


def test_the_gap_is_that_of_the_worse_token():
    logits = {1: 20.0, 2: 19.5, 3: 18.0}
    assert gap_between(logits, 1, 2) == Gap(0.5, 20.0)
    assert gap_between(logits, 2, 3) == Gap(2.0, 20.0)
    assert gap_between(logits, 1, 4) is None


def test_the_same_tokens_are_equal():
    same = verdict(PLAIN, PLAIN)
    assert (same.equal, same.near_tie, same.different, same.exact, same.differences) == (3, 0, 0, True, ())


def test_one_round_that_differs_counts():
    found = verdict(PLAIN, [(5, 8, 7), *PLAIN[1:]])
    assert (found.equal, found.different, found.exact) == (2, 1, False)
    assert [(each.prompt, each.position) for each in found.differences] == [(0, 1)]


def test_a_small_gap_excuses_greedy_text_in_16_bits():
    other = [(5, 8, 7), *PLAIN[1:]]
    tied = verdict(other, gap=Gap(0.125, 20.0))
    assert (tied.equal, tied.near_tie, tied.different, tied.exact) == (2, 1, 0, True)
    [where] = tied.differences
    assert (where.prompt, where.position, where.gap, where.steps, where.is_near_tie) == (0, 1, 0.125, 1.0, True)
    assert verdict(other, gap=Gap(0.375, 20.0)).exact is False
    assert verdict(other, gap=None).exact is False
    assert verdict(other, gap=Gap(0.0, 20.0), dtype=FLOAT32).exact is False
    assert verdict(other, gap=Gap(0.0, 20.0), is_greedy=False).exact is False


def test_a_prompt_counts_by_its_worst_answer():
    gaps = iter([Gap(0.0, 20.0), Gap(5.0, 20.0)])
    rounds = [[(5, 8), *PLAIN[1:]], [(4, 6), *PLAIN[1:]]]
    found = judge(PROMPTS, PLAIN, rounds, BFLOAT16, lambda branchings: [next(gaps) for _ in branchings], True)
    assert (found.equal, found.near_tie, found.different) == (2, 0, 1)
    assert [each.is_near_tie for each in found.differences] == [True, False]


def test_an_answer_that_ends_early_is_no_near_tie():
    assert verdict([(5, 6), *PLAIN[1:]], gap=Gap(0.0, 20.0)).exact is False


def test_the_gap_is_asked_after_the_shared_text():
    asked: list[Branching] = []

    def ask(branchings: Sequence[Branching]) -> list[Gap | None]:
        asked.extend(branchings)
        return [None] * len(branchings)

    judge(PROMPTS, PLAIN, [[(5, 8, 7), (5, 6), (9,)]], BFLOAT16, ask, True)
    assert asked == [Branching((1, 5), 6, 8)]


def test_what_is_not_promised_is_counted_and_not_judged():
    found = verdict([(4,), *PLAIN[1:]], is_promised=False)
    assert (found.different, found.exact) == (1, None)
