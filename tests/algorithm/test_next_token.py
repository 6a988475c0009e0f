"""The most probable next token along a text, against the sum over all alignments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.algorithm import conditioned_next_tokens, independent_next_tokens

from .brute_force import Case, ConditionedCase, Prefix, cases, prefix_probabilities


def _next_tokens(case: Case, path: Prefix) -> list[int]:
    logits, text = case.logits[None], torch.tensor([path])
    if isinstance(case, ConditionedCase):
        anchors = torch.tensor([case.anchor])
        return conditioned_next_tokens(logits, anchors, text, case.condition_last, case.condition_next)[0].tolist()
    return independent_next_tokens(logits, text)[0].tolist()


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_no_other_token_has_a_larger_prefix_probability(case: Case, data: st.DataObject):
    num_frames, num_labels = case.logits.shape
    path = tuple(data.draw(st.lists(st.integers(0, num_labels - 2), min_size=num_frames, max_size=num_frames)))
    psi = prefix_probabilities(case.outcomes())
    for depth, best in enumerate(_next_tokens(case, path)):
        children = [psi.get((*path[:depth], token), 0.0) for token in range(num_labels - 1)]
        assert (best == -1) == (max(children) == 0)
        assert best == -1 or children[best] == pytest.approx(max(children), rel=1e-4)


def _tables(num_tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(num_tokens, 3), torch.randn(num_tokens + 1, 3)


def test_requests_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    logits, anchors, path, tables = torch.randn(5, 4, 8), torch.arange(5), torch.randint(7, (5, 4)), _tables(7)
    conditioned = conditioned_next_tokens(logits, anchors, path, *tables)
    independent = independent_next_tokens(logits, path)
    for i in range(5):
        one = slice(i, i + 1)
        assert torch.equal(conditioned_next_tokens(logits[one], anchors[one], path[one], *tables), conditioned[one])
        assert torch.equal(independent_next_tokens(logits[one], path[one]), independent[one])


def test_prefixes_far_below_single_precision_still_have_a_next_token():
    logits = torch.full((1, 3, 4), -200.0)
    logits[..., 1] = 0.0
    path = torch.tensor([[0, 2, 1]])
    tables = torch.zeros(3, 1), torch.zeros(4, 1)
    assert independent_next_tokens(logits, path).tolist() == [[1, 1, 1]]
    assert conditioned_next_tokens(logits, torch.tensor([0]), path, *tables).tolist() == [[1, 1, 1]]
