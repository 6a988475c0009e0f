"""Exact alignment-sum losses of both emission families, with their plain gradients.

Letters: S anchors, T frames, U labels, V vocabulary without blank, r rank of the conditioning tables.
Column V of any logits is the blank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.training.fused import ConditionedCrossEntropy

IMPOSSIBLE = -1e30
"""Stands for log 0: with -inf, the gradient of logaddexp(-inf, -inf) is not a number."""


LOGITS_PER_CHUNK = 2**24
"""Logits that exist at a time where alignments are summed; each chunk converts the tables again, so it is not small."""


@dataclass(frozen=True)
class AlignmentLoss:
    mean: Tensor
    """[] float32, mean negative log-likelihood of the labels over the counted anchors."""
    num_impossible: Tensor
    """[] int64, anchors without any alignment (independent only: a repeat needs a blank in between)."""


def alignment_loss(
    drafter: CTCDrafter, frames: Tensor, lm_head: Tensor, anchors: Tensor, labels: Tensor
) -> AlignmentLoss:
    """Loss of `frames` [S, T, H] for `labels` [S, U] that follow `anchors` [S], with the target's `lm_head` [V, H].

    The logits exist in chunks only, so that memory grows neither with S nor with V.
    """
    num_impossible = torch.zeros((), dtype=torch.int64, device=frames.device)
    if drafter.config.emission == "conditioned" and frames.shape[1] == labels.shape[1]:
        total = _without_slack(drafter, frames, lm_head, anchors, labels)
        return AlignmentLoss(total / max(len(labels), 1), num_impossible)

    def chunk_loss(frames: Tensor, anchors: Tensor, labels: Tensor) -> Tensor:
        logits = torch.cat((frames @ lm_head.T, drafter.blank_logits(frames)[..., None]), dim=-1)
        if drafter.config.emission == "independent":
            return independent_loss(logits, labels)
        return conditioned_loss(logits, anchors, labels, drafter.condition_last.weight, drafter.condition_next.weight)

    num_anchors = max(1, LOGITS_PER_CHUNK // (frames.shape[1] * len(lm_head)))
    chunks = zip(*(x.split(num_anchors) for x in (frames, anchors, labels)), strict=True)
    losses = torch.cat([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks])
    if drafter.config.emission == "independent":
        num_impossible = (~has_alignment(labels, frames.shape[1])).sum()
    return AlignmentLoss(losses.sum() / (len(losses) - num_impossible).clamp_min(1), num_impossible)


def _without_slack(drafter: CTCDrafter, frames: Tensor, lm_head: Tensor, anchors: Tensor, labels: Tensor) -> Tensor:
    """[] float32, the sum of `conditioned_loss` where T = U, so that label t can only stand at frame t."""
    last = drafter.condition_last(torch.cat((anchors[:, None], labels[:, :-1]), dim=1))
    total: Tensor = ConditionedCrossEntropy.apply(
        frames.flatten(0, 1),
        lm_head,
        last.flatten(0, 1),
        drafter.condition_next.weight,
        drafter.blank_logits(frames).flatten(),
        labels.flatten(),
    )
    return total


def conditioned_loss(
    logits: Tensor, anchors: Tensor, labels: Tensor, condition_last: Tensor, condition_next: Tensor
) -> Tensor:
    """[S] float32, -log of the summed probability of all alignments, one label per frame and the rest blank.

    p_t(c | u) = softmax_c(logits_t[c] + condition_last[u] . condition_next[c]), u the last emitted label (at first
    the anchor), and alpha_t(j) = alpha_{t-1}(j) p_t(blank | y_j) + alpha_{t-1}(j-1) p_t(y_j | y_{j-1}), the
    forward recursion of Graves (2012, arXiv 1211.3711) on the monotonic topology. With T = U it is the
    cross-entropy of label t at frame t.

    logits: [S, T, V + 1]; anchors: [S]; labels: [S, U]; condition_last: [V, r]; condition_next: [V + 1, r].
    """
    num_frames, blank = logits.shape[1], logits.shape[2] - 1
    last = torch.cat((anchors[:, None], labels), dim=1)
    bias = F.embedding(last, condition_last) @ condition_next.T
    with torch.autocast(logits.device.type, enabled=False):
        logits, bias = logits.float(), bias.float()
        normalizer = _pairwise_normalizer(logits, bias)
        blank_logp = logits[:, :, None, blank] + bias[:, None, :, blank] - normalizer
        own_bias = bias[:, :-1].gather(2, labels[..., None])[..., 0]
        index = labels[:, None, :].expand(-1, num_frames, -1)
        label_logp = logits.gather(2, index) + own_bias[:, None] - normalizer[:, :, :-1]
        alpha = F.pad(torch.zeros_like(blank_logp[:, 0, :1]), (0, labels.shape[1]), value=IMPOSSIBLE)
        for frame in range(num_frames):
            stay = alpha + blank_logp[:, frame]
            advance = alpha[:, :-1] + label_logp[:, frame]
            alpha = torch.cat((stay[:, :1], torch.logaddexp(stay[:, 1:], advance)), dim=1)
        return -alpha[:, -1]


def _pairwise_normalizer(logits: Tensor, bias: Tensor) -> Tensor:
    """[S, T, U + 1], log sum_c exp(logits[t, c] + bias[u, c]) of every pair, as one batched product.

    Each factor is scaled by its own maximum. A pair underflows only where every class is 87 nats below both maxima
    together; the floor keeps such a pair finite.
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
