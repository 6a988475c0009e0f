from __future__ import annotations

import pytest

from tests.bench.samples import EXACT, plain_pass, tree_pass
from vllm_ctc_spec.bench.summary import summarize

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
