"""The most probable next token along a text, against the sum over all alignments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ctc_spec.algorithm import Conditioning, conditioned_next_tokens, independent_next_tokens

from .brute_force import Case, ConditionedCase, Prefix, cases, prefix_probabilities


def _next_tokens(case: Case, path: Prefix) -> list[int]:
    logits, text = case.logits[None], torch.tensor([path])
    if isinstance(case, ConditionedCase):
        condition = case.start[None], case.gate[None], case.conditioning
        return conditioned_next_tokens(logits, *condition, text)[0].tolist()
    return independent_next_tokens(logits, text)[0].tolist()


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_no_other_token_has_a_larger_prefix_probability(case: Case, data: st.DataObject):
    num_frames = len(case.logits)
    path = tuple(data.draw(st.lists(st.integers(0, case.num_tokens - 1), min_size=num_frames, max_size=num_frames)))
    psi = prefix_probabilities(case.outcomes())
    for depth, best in enumerate(_next_tokens(case, path)):
        children = [psi.get((*path[:depth], token), 0.0) for token in range(case.num_tokens)]
        assert (best == -1) == (max(children) == 0)
        assert best == -1 or children[best] == pytest.approx(max(children), rel=1e-4)


def test_requests_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    logits, path, start, gate = torch.randn(5, 4, 8), torch.randint(7, (5, 4)), torch.randn(5, 3), torch.randn(5, 3)
    tables = Conditioning(torch.randn(7, 3), torch.randn(3, 3), torch.randn(8, 3))
    conditioned = conditioned_next_tokens(logits, start, gate, tables, path)
    independent = independent_next_tokens(logits, path)
    for i in range(5):
        one = slice(i, i + 1)
        alone = conditioned_next_tokens(logits[one], start[one], gate[one], tables, path[one])
        assert torch.equal(alone, conditioned[one])
        assert torch.equal(independent_next_tokens(logits[one], path[one]), independent[one])


def test_prefixes_far_below_single_precision_still_have_a_next_token():
    logits = torch.full((1, 3, 4), -200.0)
    logits[..., 1] = 0.0
    path = torch.tensor([[0, 2, 1]])
    zero, tables = torch.zeros(1, 1), Conditioning(torch.zeros(3, 1), torch.zeros(1, 1), torch.zeros(4, 1))
    assert independent_next_tokens(logits, path).tolist() == [[1, 1, 1]]
    assert conditioned_next_tokens(logits, zero, zero, tables, path).tolist() == [[1, 1, 1]]
