"""Losses, compared with sums over all alignments and with PyTorch's cross-entropy."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.drafter import CTCDrafter, CTCDrafterConfig, Draft
from vllm_ctc_spec.training.data import MISSING
from vllm_ctc_spec.training.loss import (
    DistilledCrossEntropy,
    DraftLoss,
    Teacher,
    alignment_loss,
    conditioned_loss,
    distillation_loss,
    gated_states,
    has_alignment,
    independent_loss,
    label_states,
    sampled_softmax,
)

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 4), st.integers(0, 10_000)).filter(
    lambda size: size[1] <= size[0]
)


def random_case(num_frames: int, num_labels: int, vocab: int, seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    logits = 2 * torch.randn(3, num_frames, vocab + 1)
    start, gate, labels = torch.randn(3, 5), torch.randn(3, 5), torch.randint(vocab, (3, num_labels))
    return logits, start, gate, labels, torch.randn(vocab, 5), torch.randn(5, 5) / 5, torch.randn(vocab + 1, 5)


def conditioned_brute_force(
    logits: Tensor, start: Tensor, gate: Tensor, labels: list[int], last: Tensor, carry: Tensor, following: Tensor
) -> float:
    """One row: the summed probability of the placements of the labels among the frames."""
    num_frames, blank = len(logits), logits.shape[1] - 1
    total = 0.0
    for frames in itertools.combinations(range(num_frames), len(labels)):
        probability, emitted, state = 1.0, 0, start
        for t in range(num_frames):
            p = (logits[t] + following @ (gate * state)).softmax(-1)
            if t in frames:
                probability *= float(p[labels[emitted]])
                state = last[labels[emitted]] + carry @ state
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
    logits, start, gate, labels, *tables = random_case(*size)
    states = gated_states(F.embedding(labels, tables[0]), tables[1], start, gate)
    losses = conditioned_loss(logits, states, tables[2], labels)
    for row, loss in enumerate(losses.tolist()):
        total = conditioned_brute_force(logits[row], start[row], gate[row], labels[row].tolist(), *tables)
        assert math.exp(-loss) == pytest.approx(total, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_independent_loss_is_the_sum_over_alignments(size):
    logits, _, _, labels, *_ = random_case(*size)
    losses, possible = independent_loss(logits, labels), has_alignment(labels, logits.shape[1])
    for row, loss in enumerate(losses.tolist()):
        total = independent_brute_force(logits[row], labels[row].tolist())
        assert bool(possible[row]) == (total > 0)
        assert (math.exp(-loss) if possible[row] else loss) == pytest.approx(total, rel=1e-4)


def test_without_slack_the_conditioned_loss_is_cross_entropy_per_position():
    logits, start, gate, labels, last, carry, following = random_case(4, 4, 7, seed=3)
    states = gated_states(F.embedding(labels, last), carry, start, gate)
    scores = logits + states[:, :-1] @ following.T
    expected = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view(3, 4).sum(1)
    losses = conditioned_loss(logits, states, following, labels)
    torch.testing.assert_close(losses, expected)


def test_extreme_logits_keep_loss_and_gradient_finite():
    logits, start, gate, labels, last, carry, following = random_case(4, 2, 7, seed=4)
    inputs = [(x * 40).requires_grad_() for x in (logits, start, last, following)]
    states = gated_states(F.embedding(labels, inputs[2]), carry, inputs[1], gate)
    loss = conditioned_loss(inputs[0], states, inputs[3], labels).sum()
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_tokens_that_stand_for_the_vocabulary_have_its_weight_and_every_label_among_them():
    torch.manual_seed(0)
    labels, frequent = torch.randint(90, 100, (6, 3)), torch.arange(10)
    tokens, offsets, columns = sampled_softmax(labels, frequent, vocab_size=100)
    certain = torch.cat((frequent, labels.unique()))
    assert torch.equal(tokens[columns], labels)
    assert len(tokens.unique()) == len(tokens) == len(certain) + len(frequent)
    assert set(tokens[offsets == 0].tolist()) == set(certain.tolist())
    assert float(offsets.exp().sum()) == pytest.approx(100)


@torch.no_grad()
def test_the_estimated_normaliser_is_right_on_average():
    drafter = small_drafter(num_frames=1, label_length=1)
    inputs = draft, lm_head, *_ = random_draft(drafter)
    everything = loss_of(drafter, inputs, torch.arange(11)).mean
    torch.testing.assert_close(everything, loss_of(drafter, inputs).mean)
    frame, estimates = draft.frames[0, 0], []
    for _ in range(500):
        # The label and two tokens stand for themselves; two are drawn for the other eight.
        tokens, offsets, _ = sampled_softmax(torch.tensor([[3]]), torch.tensor([0, 7]), vocab_size=11)
        estimates.append((lm_head[tokens] @ frame + offsets).exp().sum())
    assert float(torch.stack(estimates).mean()) == pytest.approx(float((lm_head @ frame).exp().sum()), rel=0.1)
    assert float(torch.stack(estimates).std()) > 0


def small_drafter(**fields: object) -> CTCDrafter:
    torch.manual_seed(0)
    return CTCDrafter(CTCDrafterConfig(**{"hidden_size": 8, "vocab_size": 11, "label_length": 3} | fields))


DraftInputs = tuple[Draft, Tensor, Tensor, Tensor]
"""Of `distillation_loss`: draft, LM head, labels and their embeddings."""


def random_draft(drafter: CTCDrafter) -> DraftInputs:
    """Of ten anchors, an LM head, labels, the first of which are all equal, and their embeddings; sets the tables."""
    torch.manual_seed(1)
    rank = 0 if drafter.config.emission == "independent" else drafter.config.condition_rank
    frames = torch.randn(10, drafter.config.num_frames, 8).requires_grad_()
    draft = Draft(frames, *(torch.randn(10, rank).requires_grad_() for _ in range(2)))
    lm_head, labels = torch.randn(11, 8), torch.randint(11, (10, drafter.config.label_length))
    labels[0] = 5
    embedding = torch.randn(11, 8)
    drafter.set_tables(embedding, lm_head)
    return draft, lm_head, labels, embedding[labels]


def random_teacher(labels: Tensor, temperature: float = 1.0) -> Teacher:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(20, labels.shape, generator=generator)
    return Teacher(torch.randn(20, 8, generator=generator), rows, lambda product: 3 * product, temperature)


def loss_of(drafter: CTCDrafter, inputs: DraftInputs, frequent: Tensor | None = None) -> DraftLoss:
    if drafter.config.has_blank:
        return alignment_loss(drafter, *inputs, frequent)
    return distillation_loss(drafter, *inputs, random_teacher(inputs[2]), frequent)


def losses_and_gradients(drafter: CTCDrafter) -> dict[str, Tensor]:
    draft, lm_head, labels, embeddings = random_draft(drafter)
    drafter.zero_grad()
    loss = loss_of(drafter, (draft, lm_head, labels, embeddings))
    (3 * loss.mean).backward()
    independent = drafter.config.emission == "independent"
    assert int(loss.num_impossible) == independent * int((~has_alignment(labels, drafter.config.num_frames)).sum())
    gradients = {name: weight.grad for name, weight in drafter.named_parameters() if weight.grad is not None}
    inputs = {name: value.grad for name, value in draft._asdict().items() if value.grad is not None}
    assert len(inputs) == (1 if independent else 3)
    return {"loss": loss.mean.detach()} | inputs | gradients


@pytest.mark.parametrize("fields", [
    {"num_frames": 4, "emission": "independent"},
    {"num_frames": 4, "condition_rank": 5},
    {"num_frames": 3, "condition_rank": 5},
    {"num_frames": 3, "condition_rank": 0},
])  # fmt: skip
def test_chunks_change_neither_loss_nor_gradient(fields, monkeypatch):
    drafter = small_drafter(**fields)
    whole = losses_and_gradients(drafter)
    assert ("blank" in whole) == drafter.config.has_blank
    monkeypatch.setattr("vllm_ctc_spec.training.loss.LOGITS_PER_CHUNK", 11 * 4 * 3)
    monkeypatch.setattr("vllm_ctc_spec.training.loss.FUSED_LOGITS_PER_CHUNK", 11 * 4)
    torch.testing.assert_close(losses_and_gradients(drafter), whole)


@pytest.mark.parametrize("rank", [5, 0])
def test_the_fused_loss_and_its_gradients_are_those_of_cross_entropy(rank):
    torch.manual_seed(0)
    inputs = torch.randn(10, 8), torch.randn(10, rank), torch.randn(11, rank)
    lm_head, offsets, row_of = torch.randn(11, 8), torch.rand(11), torch.randint(4, (10,))
    probabilities = torch.randn(4, 11).softmax(-1)

    def plain(frames: Tensor, lm_head: Tensor, states: Tensor, following: Tensor, *rest: Tensor) -> Tensor:
        offsets, probabilities, row_of = rest
        logits = frames @ lm_head.T + states @ following.T + offsets
        return F.cross_entropy(logits, probabilities[row_of], reduction="sum")

    def loss_and_gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        frames, states, following = (x.clone().requires_grad_() for x in inputs)
        loss = function(frames, lm_head, states, following, offsets, probabilities, row_of)
        (3 * loss).backward()
        return [loss.detach(), frames.grad, states.grad, following.grad]

    torch.testing.assert_close(loss_and_gradients(DistilledCrossEntropy.apply), loss_and_gradients(plain))


def cross_entropies(drafter: CTCDrafter, teacher: Teacher, inputs: DraftInputs) -> Tensor:
    """[S, U], of each label, by PyTorch."""
    draft, lm_head, labels, embeddings = inputs
    states = label_states(drafter, draft, embeddings)[:, :-1]
    logits = draft.frames @ lm_head.T + states @ drafter.next_rows(lm_head).T
    wanted = (3 * teacher.hidden @ lm_head.T / teacher.temperature).softmax(-1)[teacher.before_labels]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1), reduction="none").view(labels.shape)


@pytest.mark.parametrize("rank", [5, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_drafter_without_blank_learns_the_targets_distributions(rank, temperature):
    drafter = small_drafter(num_frames=3, condition_rank=rank)
    inputs = random_draft(drafter)
    teacher = random_teacher(inputs[2], temperature)
    loss = distillation_loss(drafter, *inputs, teacher).mean
    torch.testing.assert_close(loss, cross_entropies(drafter, teacher, inputs).sum(1).mean())


@torch.no_grad()
def test_a_label_weighs_less_than_the_one_before_it():
    drafter = small_drafter(num_frames=3, condition_rank=5)
    inputs = random_draft(drafter)
    teacher = random_teacher(inputs[2])
    first, second, third = cross_entropies(drafter, teacher, inputs).mean(0)
    expected = 3 * (first + second / 2 + third / 4) / (1 + 1 / 2 + 1 / 4)
    losses = [distillation_loss(drafter, *inputs, teacher, label_decay=0.5).mean for _ in range(1000)]
    assert float(torch.stack(losses).mean()) == pytest.approx(float(expected), rel=0.01)


def test_missing_labels_do_not_count():
    drafter = small_drafter(num_frames=3, condition_rank=5)
    draft, lm_head, labels, embeddings = random_draft(drafter)
    labels[4:, 1:] = MISSING
    labels[7:, 2] = MISSING
    teacher = random_teacher(labels)
    each = cross_entropies(drafter, teacher, (draft, lm_head, labels, embeddings))
    loss = distillation_loss(drafter, draft, lm_head, labels, embeddings, teacher).mean
    torch.testing.assert_close(loss, 3 * each[labels != MISSING].mean())
