"""Laws of the emission probabilities, against plain softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.algorithm import ConditionedEmissions, conditioned_emissions, emissions, independent_emissions

from .brute_force import ConditionedCase, conditioned_cases


def _case(num_requests: int = 3, num_tokens: int = 30, rank: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    return (
        2 * torch.randn(num_requests, 5, num_tokens + 1),
        torch.randint(num_tokens, (num_requests,)),
        torch.randn(num_tokens, rank),
        torch.randn(num_tokens + 1, rank),
    )


def _plain(logits: Tensor, anchors: Tensor, last: Tensor, following: Tensor) -> Tensor:
    """[R, T, V, V + 1] log p_t(c | u), every u."""
    return (logits.double()[:, :, None] + last.double() @ following.double().T).log_softmax(-1)


def _assert_equal_to_plain(got: ConditionedEmissions, plain: Tensor, anchors: Tensor) -> None:
    for request, tokens in enumerate(got.tokens):
        pairs, root = plain[request][:, tokens], plain[request][:, anchors[request]]
        for values, expected in (
            (got.pair_logp, pairs[..., tokens]),
            (got.pair_blank_logp, pairs[..., -1]),
            (got.root_logp, root[:, tokens]),
            (got.root_blank_logp, root[:, -1]),
        ):
            torch.testing.assert_close(values[request].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_candidates", [1, 7, 30, 99])
def test_independent_candidates_are_the_tokens_most_probable_in_any_frame(num_candidates: int) -> None:
    logits = _case()[0]
    logp = logits.log_softmax(-1)
    got = independent_emissions(logits, num_candidates)
    for request in range(3):
        best = sorted(range(30), key=lambda token: -logp[request, :, token].max())[:num_candidates]
        assert got.tokens[request].tolist() == best
        torch.testing.assert_close(got.token_logp[request], logp[request][:, best])
    torch.testing.assert_close(got.blank_logp, logp[..., -1])


@settings(max_examples=60, deadline=None)
@given(conditioned_cases(), st.integers(1, 3))
def test_conditioned_candidates_are_the_tokens_most_probably_emitted_in_any_frame(
    case: ConditionedCase, num_candidates: int
) -> None:
    num_frames, num_labels = case.logits.shape
    emitted = torch.zeros(num_frames, num_labels, dtype=torch.float64)
    for alignment, chance in case.alignments():
        emitted[range(num_frames), alignment] += chance
    best = emitted[:, :-1].amax(0)
    anchors = torch.tensor([case.anchor])
    got = conditioned_emissions(
        case.logits[None], anchors, case.condition_last, case.condition_next, num_candidates
    ).tokens[0]
    assert got.unique().numel() == got.numel() == min(num_candidates, num_labels - 1)
    assert best[got].sum().item() == pytest.approx(best.topk(got.numel()).values.sum().item(), rel=1e-5)


@pytest.mark.parametrize("num_candidates", [1, 7, 30])
@pytest.mark.parametrize("requests_at_once", [1, 3])
def test_conditioned_emissions_equal_the_softmax_over_the_whole_vocabulary(
    num_candidates: int, requests_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emissions, "_CPU_CHUNK_ELEMENTS", requests_at_once * num_candidates * 31)
    case = _case()
    _assert_equal_to_plain(conditioned_emissions(*case, num_candidates), _plain(*case), case[1])


def test_the_first_frame_chooses_candidates_with_the_bias_of_the_anchor() -> None:
    logits, anchors, last, following = torch.zeros(1, 2, 9), torch.tensor([5]), torch.zeros(8, 1), torch.zeros(9, 1)
    last[5], following[3] = 1.0, 4.0
    assert conditioned_emissions(logits, anchors, last, following, 1).tokens.tolist() == [[3]]


@pytest.mark.parametrize("support", [1, 30])
def test_the_restricted_normaliser_is_exact_when_every_token_is_a_candidate(
    support: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = _case()
    monkeypatch.setattr(emissions, "EXACT_NORMALISER_MAX_VOCABULARY", 0)
    monkeypatch.setattr(emissions, "NORMALISER_SUPPORT", support)
    _assert_equal_to_plain(conditioned_emissions(*case, 30), _plain(*case), case[1])


@pytest.mark.parametrize("num_candidates", [3, 6])
def test_the_restricted_normaliser_is_exact_when_only_its_support_is_biased(
    num_candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, anchors, last, following = _case(num_requests=1)
    logits[..., :6] += 9.0
    following[6:-1] = 0.0
    case = logits, anchors, last, following
    monkeypatch.setattr(emissions, "EXACT_NORMALISER_MAX_VOCABULARY", 0)
    monkeypatch.setattr(emissions, "NORMALISER_SUPPORT", 6)
    _assert_equal_to_plain(conditioned_emissions(*case, num_candidates), _plain(*case), anchors)


def test_the_normaliser_survives_frames_and_bias_that_disagree_by_hundreds() -> None:
    logits = torch.tensor([[[200.0, 0.0, 0.0]]])
    last, following = torch.ones(2, 1), torch.tensor([[0.0], [201.0], [0.0]])
    got = conditioned_emissions(logits, torch.tensor([0]), last, following, 2)
    assert got.tokens.tolist() == [[1, 0]]
    expected = torch.tensor([0.0, -1.0]).log_softmax(-1)
    torch.testing.assert_close(got.pair_logp[0, 0], expected.expand(2, 2))


def test_impossible_labels_stay_impossible() -> None:
    logits, anchors, last, following = _case()
    logits[..., -1] = -torch.inf
    logits[:, 1, 1:] = -torch.inf
    case = logits, anchors, last, following
    _assert_equal_to_plain(conditioned_emissions(*case, 12), _plain(*case), anchors)


@pytest.mark.parametrize("build", [conditioned_emissions, lambda logits, *_: independent_emissions(logits, 8)])
def test_half_precision_logits_are_normalised_in_single_precision(build: Callable) -> None:
    logits, *rest = _case()
    got, expected = build(logits.bfloat16(), *rest, 8), build(logits.bfloat16().float(), *rest, 8)
    for field in fields(got):
        torch.testing.assert_close(getattr(got, field.name), getattr(expected, field.name), rtol=0, atol=0)


def test_unusable_arguments_are_refused_by_name() -> None:
    logits, anchors, last, following = _case()
    with pytest.raises(ValueError, match=r"shape \(5, 31\)"):
        independent_emissions(logits[0], 4)
    with pytest.raises(ValueError, match="num_candidates=0"):
        independent_emissions(logits, 0)
    with pytest.raises(ValueError, match="30 and 30 rows"):
        conditioned_emissions(logits, anchors, last, following[:-1], 4)
