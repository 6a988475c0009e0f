"""Alignment-sum losses against the sum over every alignment."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.drafter import CTCDrafter, CTCDrafterConfig
from vllm_ctc_spec.training.loss import alignment_loss, conditioned_loss, has_alignment, independent_loss

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 4), st.integers(0, 10_000)).filter(
    lambda size: size[1] <= size[0]
)


def random_case(num_frames: int, num_labels: int, vocab: int, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(3, num_frames, vocab + 1)
    anchors, labels = torch.randint(vocab, (3,)), torch.randint(vocab, (3, num_labels))
    return logits, anchors, labels, torch.randn(vocab, 5), torch.randn(vocab + 1, 5)


def conditioned_brute_force(logits: Tensor, anchor: int, labels: list[int], last: Tensor, following: Tensor) -> float:
    """One row: the summed probability of the placements of the labels among the frames."""
    num_frames, blank = len(logits), logits.shape[1] - 1
    total = 0.0
    for frames in itertools.combinations(range(num_frames), len(labels)):
        probability, emitted = 1.0, 0
        for t in range(num_frames):
            previous = anchor if emitted == 0 else labels[emitted - 1]
            p = (logits[t] + following @ last[previous]).softmax(-1)
            if t in frames:
                probability *= float(p[labels[emitted]])
                emitted += 1
            else:
                probability *= float(p[blank])
        total += probability
    return total


def independent_brute_force(logits: Tensor, labels: list[int]) -> float:
    """One row: the summed probability of the alignments that collapse to the labels."""
    p, blank = logits.softmax(-1), logits.shape[1] - 1
    total = 0.0
    for alignment in itertools.product(range(blank + 1), repeat=len(logits)):
        merged = [label for label, _ in itertools.groupby(alignment) if label != blank]
        if merged == labels:
            total += math.prod(float(p[t, label]) for t, label in enumerate(alignment))
    return total


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_conditioned_loss_is_the_sum_over_alignments(size):
    logits, anchors, labels, last, following = random_case(*size)
    losses = conditioned_loss(logits, anchors, labels, last, following)
    for row, loss in enumerate(losses.tolist()):
        total = conditioned_brute_force(logits[row], int(anchors[row]), labels[row].tolist(), last, following)
        assert math.exp(-loss) == pytest.approx(total, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_independent_loss_is_the_sum_over_alignments(size):
    logits, _, labels, _, _ = random_case(*size)
    losses, possible = independent_loss(logits, labels), has_alignment(labels, logits.shape[1])
    for row, loss in enumerate(losses.tolist()):
        total = independent_brute_force(logits[row], labels[row].tolist())
        assert bool(possible[row]) == (total > 0)
        assert (math.exp(-loss) if possible[row] else loss) == pytest.approx(total, rel=1e-4)


def test_without_slack_the_conditioned_loss_is_cross_entropy_per_position():
    logits, anchors, labels, last, following = random_case(4, 4, 7, seed=3)
    previous = torch.cat((anchors[:, None], labels[:, :-1]), dim=1)
    scores = logits + last[previous] @ following.T
    expected = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view(3, 4).sum(1)
    torch.testing.assert_close(conditioned_loss(logits, anchors, labels, last, following), expected)


def test_extreme_logits_keep_loss_and_gradient_finite():
    logits, anchors, labels, last, following = random_case(4, 2, 7, seed=4)
    inputs = [(x * 40).requires_grad_() for x in (logits, last, following)]
    loss = conditioned_loss(inputs[0], anchors, labels, inputs[1], inputs[2]).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in inputs)


def small_drafter(**fields: object) -> CTCDrafter:
    torch.manual_seed(0)
    return CTCDrafter(CTCDrafterConfig(hidden_size=8, vocab_size=11, label_length=3, **fields))


def losses_and_gradients(drafter: CTCDrafter) -> dict[str, Tensor]:
    torch.manual_seed(1)
    frames, lm_head = torch.randn(10, drafter.config.num_frames, 8).requires_grad_(), torch.randn(11, 8)
    anchors, labels = torch.randint(11, (10,)), torch.randint(11, (10, 3))
    labels[0] = 5
    drafter.zero_grad()
    loss = alignment_loss(drafter, frames, lm_head, anchors, labels)
    (3 * loss.mean).backward()
    independent = drafter.config.emission == "independent"
    assert int(loss.num_impossible) == independent * int((~has_alignment(labels, drafter.config.num_frames)).sum())
    gradients = {name: weight.grad for name, weight in drafter.named_parameters() if weight.grad is not None}
    return {"loss": loss.mean.detach(), "frames": frames.grad} | gradients


@pytest.mark.parametrize("fields", [
    {"num_frames": 4, "emission": "independent"},
    {"num_frames": 4, "condition_rank": 5},
    {"num_frames": 3, "condition_rank": 5},
    {"num_frames": 3, "condition_rank": 0},
])  # fmt: skip
def test_chunks_change_neither_loss_nor_gradient(fields, monkeypatch):
    drafter = small_drafter(**fields)
    whole = losses_and_gradients(drafter)
    assert "blank" in whole
    monkeypatch.setattr("vllm_ctc_spec.training.loss.LOGITS_PER_CHUNK", 11 * 4 * 3)
    monkeypatch.setattr("vllm_ctc_spec.training.fused.LOGITS_PER_CHUNK", 11 * 4)
    torch.testing.assert_close(losses_and_gradients(drafter), whole)


@pytest.mark.parametrize("rank", [5, 0])
def test_the_fused_loss_and_its_gradients_are_those_of_the_sum_over_alignments(rank, monkeypatch):
    drafter = small_drafter(num_frames=3, condition_rank=rank)
    fused = losses_and_gradients(drafter)

    def summed(drafter: CTCDrafter, frames: Tensor, lm_head: Tensor, anchors: Tensor, labels: Tensor) -> Tensor:
        logits = torch.cat((frames @ lm_head.T, drafter.blank_logits(frames)[..., None]), dim=-1)
        tables = drafter.condition_last.weight, drafter.condition_next.weight
        return conditioned_loss(logits, anchors, labels, *tables).sum()

    monkeypatch.setattr("vllm_ctc_spec.training.loss._without_slack", summed)
    torch.testing.assert_close(losses_and_gradients(drafter), fused)
