from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vllm_ctc_spec.bench.ratio import paired_ratio


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
