"""Losses of drafters: sums over alignments, and for drafters without a blank the distance to the target's distribution.

Letters: S anchors, T frames, U labels, V vocabulary without blank, H hidden size, r rank of the conditioning,
P positions of the text, n rows of the fused loss.
Column V of any logits is the blank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vllm_ctc_spec.drafter import CTCDrafter, Draft
from vllm_ctc_spec.training.data import MISSING

LOG_ZERO = -1e30
"""Stands for log 0. With -inf the gradient of logaddexp(-inf, -inf) would be NaN."""


LOGITS_PER_CHUNK = 2**24
"""Most logits in memory at a time where alignments are summed. Each chunk converts the tables again, so chunks should
not be small."""


@dataclass(frozen=True)
class DraftLoss:
    mean: Tensor
    """[] float32, mean over anchors of what their labels cost, in nats; impossible anchors are not counted."""
    num_impossible: Tensor
    """[] int64, anchors without any alignment (independent emissions only: a repeat needs a blank in between)."""


class Teacher(NamedTuple):
    """The target, whose distribution of each label a drafter without a blank learns."""

    hidden: Tensor
    """[P, H], the target's last hidden states."""
    before_labels: Tensor
    """[S, U] int64, which of the P positions precedes each label."""
    logits_of: Callable[[Tensor], Tensor]
    """From products of last hidden states and LM head to the target's logits."""
    temperature: float
    """Of the distribution that is learnt."""


def alignment_loss(
    drafter: CTCDrafter,
    draft: Draft,
    lm_head: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    frequent: Tensor | None = None,
) -> DraftLoss:
    """Loss of the `draft` of S anchors for the labels that follow them, by a drafter with a blank.

    lm_head: [V, H], the target's. labels: [S, U] int64. label_embeddings: [S, U, H], the target's embeddings of the
    labels. frequent: [K] int64, tokens for an estimate of the normaliser, see `sampled_softmax`; None: exact, over the
    whole vocabulary.

    Logits are computed in chunks, so memory grows neither with S nor with V.
    """
    config = drafter.config
    lm_head, offsets, columns = _classes(lm_head, labels, frequent)

    def logits(frames: Tensor) -> Tensor:
        return torch.cat((frames @ lm_head.T + offsets, drafter.blank_logits(frames)[..., None]), dim=-1)

    def in_chunks(loss: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """[] float32, the sum of `loss` over the anchors, which are the first dimension of all inputs."""
        num_anchors = max(1, LOGITS_PER_CHUNK // (config.num_frames * len(lm_head)))
        chunks = zip(*(x.split(num_anchors) for x in inputs), strict=True)
        return torch.cat([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    if config.emission == "independent":
        total = in_chunks(lambda frames, columns: independent_loss(logits(frames), columns), draft.frames, columns)
        num_impossible = (~has_alignment(labels, config.num_frames)).sum()
        return DraftLoss(total / (len(labels) - num_impossible).clamp_min(1), num_impossible)
    following = drafter.next_rows(lm_head)
    total = in_chunks(
        lambda frames, states, columns: conditioned_loss(logits(frames), states, following, columns),
        draft.frames,
        label_states(drafter, draft, label_embeddings),
        columns,
    )
    return DraftLoss(total / max(len(labels), 1), _no_anchor(labels))


def distillation_loss(
    drafter: CTCDrafter,
    draft: Draft,
    lm_head: Tensor,
    labels: Tensor,
    label_embeddings: Tensor,
    teacher: Teacher,
    frequent: Tensor | None = None,
    label_decay: float = 1.0,
) -> DraftLoss:
    """Cross-entropy of a drafter without a blank to the target's distribution of each label, given the labels before it
    (Hinton et al. 2015, arXiv 1503.02531).

    The last labels of an anchor may be MISSING and are not counted. label_decay: label u is counted with probability
    label_decay ** u. Other arguments as in `alignment_loss`.
    """
    head, offsets, _ = _classes(lm_head, labels.where(labels != MISSING, labels[:, :1]), frequent)
    with torch.no_grad():
        logits = teacher.logits_of(teacher.hidden @ head.T) / teacher.temperature
        probabilities = (logits + offsets).softmax(-1).to(head.dtype)
    # Drawn by their weights, labels cost less than weighted, and the gradient is the same on average.
    shares = label_decay ** torch.arange(labels.shape[1], device=labels.device)
    drawn = ((labels != MISSING) & (torch.rand(labels.shape, device=labels.device) < shares)).flatten().nonzero()[:, 0]
    total = DistilledCrossEntropy.apply(
        draft.frames.flatten(0, 1)[drawn],
        head,
        label_states(drafter, draft, label_embeddings)[:, :-1].flatten(0, 1)[drawn],
        drafter.next_rows(head),
        offsets,
        probabilities,
        teacher.before_labels.flatten()[drawn],
    )
    return DraftLoss(total * (labels.shape[1] / max(len(drawn), 1)), _no_anchor(labels))


def _no_anchor(labels: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=labels.device)


def _classes(lm_head: Tensor, labels: Tensor, frequent: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the LM head [K', H] that enter the normaliser, their log weights [K'], and the labels' columns."""
    if frequent is None:
        return lm_head, torch.zeros(len(lm_head), device=labels.device), labels
    sampled, offsets, columns = sampled_softmax(labels, frequent, len(lm_head))
    return lm_head[sampled], offsets, columns


def sampled_softmax(labels: Tensor, frequent: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled softmax (Bengio and Senecal 2008): tokens [K'] that enter this step's normaliser, their log weights [K'],
    and the columns of the labels among them, of the shape of `labels`.

    All labels and the K `frequent` tokens enter with weight 1. Of the other tokens, K drawn at random enter with equal
    weights that sum to the number of the others, so that the normaliser's expectation is exact.
    """
    stands = torch.zeros(vocab_size, dtype=torch.bool, device=labels.device)
    stands[frequent] = True
    stands[labels.flatten()] = True
    certain, others = stands.nonzero()[:, 0], (~stands).nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), device=labels.device)[: len(frequent)]]
    offsets = torch.zeros(len(certain) + len(drawn), device=labels.device)
    offsets[len(certain) :] = math.log(max(len(others), 1) / max(len(drawn), 1))
    columns = stands.cumsum(0) - 1
    return torch.cat((certain, drawn)), offsets, columns[labels]


def label_states(drafter: CTCDrafter, draft: Draft, label_embeddings: Tensor) -> Tensor:
    """[S, U + 1, r], the gated states after 0 .. U labels. label_embeddings: [S, U, H]."""
    rows = drafter.condition_last(label_embeddings)
    return gated_states(rows, drafter.condition_carry.weight, draft.start, draft.gate)


def gated_states(label_rows: Tensor, carry: Tensor, start: Tensor, gate: Tensor) -> Tensor:
    """[S, U + 1, r], gated states after 0 .. U labels, where s(h.c) = A[c] + W s(h).

    label_rows: [S, U, r], rows of A of the labels; carry: [r, r], the matrix W; start, gate: [S, r].
    """
    states = [start]
    for rows in label_rows.unbind(1):
        states.append(rows + states[-1] @ carry.T)
    return torch.stack(states, dim=1) * gate[:, None]


def conditioned_loss(logits: Tensor, states: Tensor, following: Tensor, labels: Tensor) -> Tensor:
    """[S] float32, -log of the total probability of all alignments, each with one label per frame and the rest blank.

    With p_t(c | h) = softmax_c(logits_t[c] + states(h) . following[c]), where h are the labels emitted so far
    (emissions.py), it is the forward recursion of Graves (2012, arXiv 1211.3711) with at most one label per frame:

        alpha_t(j) = alpha_{t-1}(j) p_t(blank | y_1 .. y_j) + alpha_{t-1}(j-1) p_t(y_j | y_1 .. y_{j-1})

    If T = U it equals the cross-entropy of label t at frame t.

    logits: [S, T, V + 1]; states: [S, U + 1, r], gated; following: [V + 1, r]; labels: [S, U].
    """
    num_frames, blank = logits.shape[1], logits.shape[2] - 1
    bias = states @ following.T
    with torch.autocast(logits.device.type, enabled=False):
        logits, bias = logits.float(), bias.float()
        normalizer = _pairwise_normalizer(logits, bias)
        blank_logp = logits[:, :, None, blank] + bias[:, None, :, blank] - normalizer
        own_bias = bias[:, :-1].gather(2, labels[..., None])[..., 0]
        index = labels[:, None, :].expand(-1, num_frames, -1)
        label_logp = logits.gather(2, index) + own_bias[:, None] - normalizer[:, :, :-1]
        alpha = F.pad(torch.zeros_like(blank_logp[:, 0, :1]), (0, labels.shape[1]), value=LOG_ZERO)
        for frame in range(num_frames):
            stay = alpha + blank_logp[:, frame]
            advance = alpha[:, :-1] + label_logp[:, frame]
            alpha = torch.cat((stay[:, :1], torch.logaddexp(stay[:, 1:], advance)), dim=1)
        return -alpha[:, -1]


def _pairwise_normalizer(logits: Tensor, bias: Tensor) -> Tensor:
    """[S, T, U + 1], log sum_c exp(logits[t, c] + bias[u, c]) for all t and u, as one batched product.

    Both factors are scaled by their maxima. The product underflows only if every class is more than 87 nats below the
    two maxima together; the floor keeps the logarithm finite there.
    """
    top_logits, top_bias = logits.detach().amax(-1, keepdim=True), bias.detach().amax(-1, keepdim=True)
    product = torch.bmm((logits - top_logits).exp(), (bias - top_bias).exp().transpose(1, 2))
    return product.clamp_min(torch.finfo(torch.float32).tiny).log() + top_logits + top_bias.transpose(1, 2)


def independent_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """[S] float32, the CTC loss (Graves et al. 2006, equation 8); 0 where no alignment exists.

    logits: [S, T, V + 1]; labels: [S, U].
    """
    num_anchors, num_frames, width = logits.shape
    return F.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        labels,
        input_lengths=torch.full((num_anchors,), num_frames),
        target_lengths=torch.full((num_anchors,), labels.shape[1]),
        blank=width - 1,
        reduction="none",
        zero_infinity=True,
    )


def has_alignment(labels: Tensor, num_frames: int) -> Tensor:
    """[S] bool, whether labels [S, U] fit into T frames when each repeat needs a blank in between."""
    num_repeats = (labels[:, 1:] == labels[:, :-1]).sum(1)
    return labels.shape[1] + num_repeats <= num_frames


FUSED_LOGITS_PER_CHUNK = 2**21
"""Most logits in memory at a time: 8 MiB in float32. A chunk that stays in a processor's cache is 15 % faster."""


class DistilledCrossEntropy(torch.autograd.Function):
    """[] float32, sum over rows of the cross-entropy of softmax(frames · lm_head + states · following + offsets) to
    the row's target distribution.

    The forward pass computes the gradient from each chunk of logits as well, so logits are neither kept nor computed
    again (as in Liger Kernel, arXiv 2410.10989). Products have the head's number type, sums are in float32. The frozen
    LM head gets no gradient.

    frames: [n, H]; lm_head: [V, H]; states: [n, r], gated; following: [V, r]; offsets: [V]; probabilities: [P, V];
    row_of: [n] int64, which of the P distributions is a row's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        lm_head: Tensor,
        states: Tensor,
        following: Tensor,
        offsets: Tensor,
        probabilities: Tensor,
        row_of: Tensor,
    ) -> Tensor:
        vocab, size = lm_head.shape
        inputs = torch.cat((frames.to(lm_head.dtype), states.to(lm_head.dtype)), dim=1)
        weight = torch.cat((lm_head, following.to(lm_head.dtype)), dim=1)
        loss = inputs.new_zeros((), dtype=torch.float32)
        inputs_grad = torch.empty_like(inputs)
        following_grad = torch.zeros_like(following, dtype=torch.float32)
        for chunk in torch.arange(len(inputs)).split(max(1, FUSED_LOGITS_PER_CHUNK // vocab)):
            rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
            wanted = probabilities[row_of[rows]].float()
            logits = (inputs[rows] @ weight.T).float().add_(offsets)
            logits.sub_(logits.logsumexp(1, keepdim=True))
            loss -= torch.dot(wanted.flatten(), logits.flatten())
            logits_grad = logits.exp_().sub_(wanted).to(inputs.dtype)
            torch.mm(logits_grad, weight, out=inputs_grad[rows])
            following_grad += logits_grad.T @ inputs[rows, size:]
        ctx.save_for_backward(
            inputs_grad[:, :size].to(frames.dtype),
            inputs_grad[:, size:].to(states.dtype),
            following_grad.to(following.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, states, following = (saved * loss_grad for saved in ctx.saved_tensors)
        return frames, None, states, following, None, None, None
