"""Cross-entropy of conditioned emissions without their logits: [n, V] never exists as a whole.

Letters: n rows (anchors times frames), H hidden size, V vocabulary, r rank of the conditioning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = 2**21
"""Logits that exist at a time (8 MiB in float32: a chunk that stays in a processor's cache is 15 % faster)."""


class ConditionedCrossEntropy(torch.autograd.Function):
    """[] float32, sum over rows of -weight * log softmax(frames · lm_head + states · following + offsets)[label].

    A chunk of logits serves for the loss and at once for its gradient, in the forward pass: they are neither kept
    nor computed again (as in Liger Kernel, arXiv 2410.10989). Products are in the head's type, sums in float32. The
    target's head is frozen and has no gradient.

    frames: [n, H]; lm_head: [V, H]; states: [n, r], gated; following: [V, r]; offsets: [V]; labels: [n] int64;
    weights: [n] float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        frames: Tensor,
        lm_head: Tensor,
        states: Tensor,
        following: Tensor,
        offsets: Tensor,
        labels: Tensor,
        weights: Tensor,
    ) -> Tensor:
        vocab, size = lm_head.shape
        inputs = torch.cat((frames.to(lm_head.dtype), states.to(lm_head.dtype)), dim=1)
        weight = torch.cat((lm_head, following.to(lm_head.dtype)), dim=1)
        loss = inputs.new_zeros((), dtype=torch.float32)
        inputs_grad = torch.empty_like(inputs)
        following_grad = torch.zeros_like(following, dtype=torch.float32)
        for chunk in torch.arange(len(inputs)).split(max(1, LOGITS_PER_CHUNK // vocab)):
            rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
            chunk_labels, chunk_weights = labels[rows, None], weights[rows, None]
            logits = (inputs[rows] @ weight.T).float().add_(offsets)
            normalizer = logits.logsumexp(1, keepdim=True)
            loss += ((normalizer - logits.gather(1, chunk_labels)) * chunk_weights).sum()
            # From here on `logits` holds their gradient.
            logits.sub_(normalizer).exp_()
            logits.scatter_add_(1, chunk_labels, logits.new_full(chunk_labels.shape, -1))
            logits_grad = logits.mul_(chunk_weights).to(inputs.dtype)
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
