"""A method's results in one cell, and the interval of its ratio to plain vLLM."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tests.bench.samples import EXACT, plain_pass, tree_pass
from vllm_ctc_spec.bench.cells import paired_ratio, summarize

PLAIN = [plain_pass(2.0), plain_pass(4.0)]
TREES = [tree_pass(1.0), tree_pass(2.0)]


def test_figures_of_a_method():
    result = summarize(["a", "b"], PLAIN, TREES, EXACT, 1, None)
    assert result.tokens_per_second == (32.0, 16.0)
    assert result.ratios == (2.0, 2.0)
    assert result.ratio.mean == pytest.approx(2.0)
    # 10 and 20 tokens after the first, in 5 steps each, with a draft or without.
    assert result.overall.beta == pytest.approx(30 / 10)
    assert result.overall.gamma == pytest.approx((2.0 / 32) / (0.5 / 32))
    assert result.categories["a"].beta == pytest.approx(10 / 5)
    assert result.categories["b"].beta == pytest.approx(20 / 5)
    # 9 steps had a draft: 1 accepted none, 1 one, 4 two, 3 three.
    assert result.acceptance_length == pytest.approx(1 + (1 + 8 + 9) / 9)
    assert result.acceptance_by_depth == pytest.approx((8 / 9, 7 / 8, 3 / 7))
    assert result.nodes_per_step == pytest.approx(72 / 9)
    assert result.first_token_ms == pytest.approx(10.0)
    assert result.per_token_ms == pytest.approx(1e3 * 0.24 * (1 / 10 + 1 / 20) / 2)


def test_plain_decoding_has_no_drafts_and_one_token_per_step():
    result = summarize(["a", "b"], PLAIN, PLAIN, EXACT, 1, None)
    assert (result.overall.beta, result.overall.gamma) == (1.0, 1.0)
    assert (result.acceptance_length, result.nodes_per_step, result.acceptance_by_depth) == (None, None, ())
    assert (result.ratio.low, result.ratio.high) == (1.0, 1.0)


def test_answers_of_one_token_divide_by_nothing():
    from tests.bench.samples import request
    from vllm_ctc_spec.bench.records import Pass

    short = [Pass(1.0, (request(1, 1, 0.01),))] * 2
    result = summarize(["a"], short, short, EXACT, 1, None)
    assert (result.overall.beta, result.per_token_ms) == (1.0, 0.0)


def test_the_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(50, 150, 10)
    values = baseline * rng.lognormal(0.4, 0.05, 10)
    ratio = paired_ratio(list(values), list(baseline))
    expected = stats.ttest_rel(np.log(values), np.log(baseline)).confidence_interval(0.95)
    assert (math.log(ratio.low), math.log(ratio.high)) == pytest.approx((expected.low, expected.high))
    assert ratio.mean == pytest.approx(stats.gmean(values / baseline))


def test_a_slow_round_that_hits_both_leaves_the_interval_alone():
    assert paired_ratio([20.0, 2.0, 40.0], [10.0, 1.0, 20.0]).low == pytest.approx(2.0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        values = rng.lognormal(math.log(1.5), 0.2, 10)
        ratio = paired_ratio(list(values), [1.0] * 10)
        covered += ratio.low <= 1.5 <= ratio.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
