"""Laws of the emission probabilities, against plain softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from vllm_ctc_spec.algorithm import (
    Conditioning,
    build_prefix_trees,
    conditioned_emissions,
    independent_emissions,
)


def _case(num_requests: int = 3, num_tokens: int = 30, rank: int = 4) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    torch.manual_seed(num_tokens)
    return (
        2 * torch.randn(num_requests, 5, num_tokens + 1),
        torch.randn(num_requests, rank),
        torch.randn(num_requests, rank),
        Conditioning(torch.randn(num_tokens, rank), torch.randn(rank, rank) / rank, torch.randn(num_tokens + 1, rank)),
    )


def _independent(logits: Tensor, *conditions: object) -> object:
    return independent_emissions(logits, conditions[-1])


@pytest.mark.parametrize("build", [conditioned_emissions, _independent])
@pytest.mark.parametrize("num_candidates", [1, 7, 30, 99])
def test_candidates_are_the_tokens_most_probable_in_any_frame(build: Callable, num_candidates: int) -> None:
    logits, *conditions = _case()
    logp = logits.log_softmax(-1)
    got = build(logits, *conditions, num_candidates)
    for request in range(3):
        best = sorted(range(30), key=lambda token: -logp[request, :, token].max())[:num_candidates]
        assert got.tokens[request].tolist() == best
        torch.testing.assert_close(got.token_logp[request], logp[request][:, best])
    torch.testing.assert_close(got.blank_logp, logp[..., -1])


def test_what_is_no_candidate_is_one_mass_without_bias() -> None:
    logits, start, gate, tables = _case(num_requests=1)
    logits[..., :6] += 9.0
    tables.logit_out[6:-1] = 0.0
    whole, restricted = (
        build_prefix_trees(conditioned_emissions(logits, start, gate, tables, num), 8) for num in (30, 6)
    )
    assert set(whole.tokens[0].tolist()) <= set(range(6))
    torch.testing.assert_close(restricted.prefix_logp, whole.prefix_logp, rtol=1e-4, atol=1e-4)
    assert torch.equal(restricted.tokens, whole.tokens) and torch.equal(restricted.parents, whole.parents)


def test_the_normaliser_survives_bias_of_hundreds() -> None:
    tables = Conditioning(torch.full((2, 1), 300.0), torch.zeros(1, 1), torch.tensor([[1.0], [0.0], [0.0]]))
    emissions = conditioned_emissions(torch.zeros(1, 2, 3), torch.full((1, 1), -300.0), torch.ones(1, 1), tables, 2)
    trees = build_prefix_trees(emissions, 2)
    # First the bias forbids token 0, then it forbids everything else.
    assert trees.tokens.tolist() == [[1, 0]] and trees.parents.tolist() == [[0, 1]]
    torch.testing.assert_close(trees.prefix_logp.exp(), torch.tensor([[0.75, 0.5]]))


@pytest.mark.parametrize("build", [conditioned_emissions, _independent])
def test_half_precision_logits_are_normalised_in_single_precision(build: Callable) -> None:
    logits, *rest = _case()
    got, expected = build(logits.bfloat16(), *rest, 8), build(logits.bfloat16().float(), *rest, 8)
    for field in fields(got):
        if field.name != "conditioning":
            torch.testing.assert_close(getattr(got, field.name), getattr(expected, field.name), rtol=0, atol=0)


def test_unusable_arguments_are_refused_by_name() -> None:
    logits, start, gate, tables = _case()
    with pytest.raises(ValueError, match=r"shape \(5, 31\)"):
        independent_emissions(logits[0], 4)
    with pytest.raises(ValueError, match="num_candidates=0"):
        independent_emissions(logits, 0)
    short = Conditioning(tables.state_in, tables.transition, tables.logit_out[:-1])
    with pytest.raises(ValueError, match="30 and 30 rows"):
        conditioned_emissions(logits, start, gate, short, 4)
