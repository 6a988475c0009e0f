"""What the weights of two sources become, against Bayes' rule written out."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ctc_spec.algorithm import Reliability, SourceWeights, log_ratio, posterior
from vllm_ctc_spec.algorithm.mixture import Given
from vllm_ctc_spec.algorithm.source_weights import ELSEWHERE, FLOOR, FORGETTING, LEAST, PRIOR

LONGEST = 4
_PROBABILITIES = st.floats(0.01, 1.0)
_settings = settings(max_examples=100, deadline=None)


def seen(*probabilities: float) -> list[Given]:
    """Of tokens that the source's tree has, with nothing beside them."""
    return [Given(each, each) for each in probabilities]


@_settings
@given(st.lists(st.tuples(_PROBABILITIES, _PROBABILITIES), max_size=6), st.floats(0.05, 0.95))
def test_the_posterior_is_bayes_rule(likelihoods: list[tuple[float, float]], prior: float) -> None:
    first, second = (math.prod(each) for each in zip(*likelihoods)) if likelihoods else (1.0, 1.0)
    ratio = log_ratio(*(seen(*each) for each in zip(*likelihoods))) if likelihoods else 0.0
    assert posterior(prior, ratio) == pytest.approx(prior * first / (prior * first + (1 - prior) * second))


def test_a_request_begins_with_equal_weights_and_goes_on_with_its_posterior() -> None:
    weights = SourceWeights(LONGEST)
    assert weights.weight(2, 0.0) == 0.5
    evidence = weights.observe(2, 0.0, log_ratio(seen(0.9, 0.8), seen(0.3, 0.6)))
    assert evidence == pytest.approx(math.log(0.9 * 0.8 / (0.3 * 0.6)))
    # At a length of the match of which nothing has been learnt yet.
    assert weights.weight(3, evidence) == pytest.approx(0.72 / (0.72 + 0.18))


@_settings
@given(st.lists(st.floats(-20, 20), max_size=30), st.integers(0, LONGEST))
def test_no_source_is_given_up_and_evidence_is_forgotten(ratios: list[float], match: int) -> None:
    weights, evidence = SourceWeights(LONGEST), 0.0
    for ratio in ratios:
        expected = FORGETTING * evidence + ratio
        evidence = weights.observe(match, evidence, ratio)
        assert FLOOR <= weights.weight(match, evidence) <= 1 - FLOOR
        if FLOOR < posterior(0.5, expected) < 1 - FLOOR:
            assert evidence == pytest.approx(expected)
        else:
            assert posterior(0.5, evidence) == pytest.approx(FLOOR if expected < 0 else 1 - FLOOR)


def test_a_text_that_turns_is_followed_at_once() -> None:
    weights, evidence = SourceWeights(LONGEST), 0.0
    for _ in range(20):
        evidence = weights.observe(4, evidence, -4.0)
    assert weights.weight(1, evidence) < 0.05
    # Two tokens that the other source had, at another length of the match.
    for _ in range(2):
        evidence = weights.observe(1, evidence, 3.0)
    assert weights.weight(1, evidence) > 0.5


def test_the_start_value_is_learnt_over_requests_by_the_length_of_the_match() -> None:
    weights = SourceWeights(LONGEST)
    for _ in range(50):
        weights.observe(1, 0.0, 3.0)
        weights.observe(4, 0.0, -3.0)
    assert weights.weight(1, 0.0) > 0.9 and weights.weight(4, 0.0) < 0.1
    assert weights.weight(2, 0.0) == 0.5


def test_a_token_that_a_source_does_not_have_counts_as_a_share_of_what_it_left_over() -> None:
    found, missed, certain = Given(0.6, 0.9), Given(0.0, 0.7), Given(0.0, 1.0)
    assert log_ratio([found], [missed]) == pytest.approx(math.log(0.6 / (ELSEWHERE * 0.3)))
    assert log_ratio([found], [certain]) == pytest.approx(math.log(0.6 / LEAST))
    # Of two that do not have it, the one that was less sure was right.
    assert log_ratio([missed], [certain]) > 0
    # Beyond the end of either tree there is nothing to compare.
    assert log_ratio([found], [found, missed]) == 0


def test_reliability_begins_with_the_rule_of_succession() -> None:
    reliability = Reliability(LONGEST)
    assert [reliability.of(match) for match in range(1, 5)] == pytest.approx([2 / 3, 3 / 4, 4 / 5, 5 / 6])
    assert reliability.of(9) == reliability.of(LONGEST)
    assert reliability.by_depth(2, 3) == pytest.approx([1, 3 / 4, 3 / 4 * 4 / 5, 3 / 4 * 4 / 5 * 5 / 6])


def test_reliability_is_the_share_of_tokens_that_were_as_before() -> None:
    reliability, draws = Reliability(LONGEST), random.Random(0)
    missed, found = Given(0.0, 1.0), Given(0.5, 1.0)
    for _ in range(1000):
        reliability.observe(1, [found if draws.random() < 0.3 else missed])
        reliability.observe(4, [found, found, found, missed])
    assert reliability.of(1) == pytest.approx(0.3, abs=0.15)
    # Each token makes the match longer, and longer ones count as of length 4.
    assert reliability.of(4) == pytest.approx(0.75, abs=0.01)
    assert reliability.of(2) == pytest.approx((PRIOR * 3 / 4) / PRIOR)


@_settings
@given(st.lists(st.tuples(st.integers(1, LONGEST), st.booleans()), max_size=50), st.integers(1, LONGEST))
def test_what_is_as_before_for_longer_is_never_more_probable(observed: list[tuple[int, bool]], match: int) -> None:
    reliability = Reliability(LONGEST)
    for place, is_found in observed:
        reliability.observe(place, [Given(float(is_found), 1.0)])
    by_depth = reliability.by_depth(match, 20)
    assert by_depth[0] == 1 and by_depth == sorted(by_depth, reverse=True) and by_depth[-1] > 0
