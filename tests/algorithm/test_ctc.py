"""Laws of the log-space reference, against all alignments."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings

from vllm_ctc_spec.algorithm import ConditionedPrefix, IndependentPrefix, collapse

from .brute_force import Case, Prefix, all_prefixes, cases, prefix_probabilities


def _extended(case: Case, prefix: Prefix) -> IndependentPrefix | ConditionedPrefix:
    state = case.root()
    for token in prefix:
        state = state.extend(token)
    return state


@pytest.mark.parametrize(
    ("alignment", "output"),
    [([], ()), ([3, 3], ()), ([1, 1, 2], (1, 2)), ([1, 3, 1], (1, 1)), ([3, 0, 0, 3, 3, 0, 2, 2], (0, 0, 2))],
)
def test_collapse_merges_repeats_before_it_drops_blanks(alignment: list[int], output: Prefix) -> None:
    assert collapse(alignment, blank=3) == output


@settings(max_examples=60, deadline=None)
@given(cases())
def test_prefix_and_end_probability_equal_the_sum_over_alignments(case: Case) -> None:
    outcomes = case.outcomes()
    psi = prefix_probabilities(outcomes)
    num_frames = len(case.logits)
    for prefix in all_prefixes(case.num_tokens, num_frames + 1):
        state = _extended(case, prefix)
        assert math.exp(state.prefix_logp) == pytest.approx(psi.get(prefix, 0.0) if prefix else 1.0, abs=1e-12)
        assert math.exp(state.end_logp) == pytest.approx(outcomes.get(prefix, 0.0), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_children_and_end_share_out_the_prefix_probability(case: Case) -> None:
    num_frames = len(case.logits)
    for prefix in all_prefixes(case.num_tokens, num_frames - 1):
        state = _extended(case, prefix)
        children = sum(math.exp(state.extend(token).prefix_logp) for token in range(case.num_tokens))
        assert children + math.exp(state.end_logp) == pytest.approx(math.exp(state.prefix_logp), abs=1e-12)
