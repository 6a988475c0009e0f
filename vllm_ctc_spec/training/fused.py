"""Cross-entropy of conditioned emissions without their logits: [n, V] never exists as a whole.

Letters: n rows (anchors times frames), H hidden size, V vocabulary without blank, r rank of the conditioning.
Column V of any logits is the blank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_PER_CHUNK = 2**21
"""Logits that exist at a time (8 MiB in float32: a chunk that stays in a processor's cache is 15 % faster)."""


class ConditionedCrossEntropy(torch.autograd.Function):
    """[] float32, sum over rows of -log softmax(frames · lm_head + states · condition_next)[label].

    A chunk of logits serves for the loss and at once for its gradient, in the forward pass: they are neither kept
    nor computed again (as in Liger Kernel, arXiv 2410.10989). Products are in the head's type, sums in float32. The
    target's head is frozen and has no gradient.

    frames: [n, H]; lm_head: [V, H]; states: [n, r], gated; condition_next: [V + 1, r];
    blank_logits: [n], before conditioning; offsets: [V], added to the tokens' logits; labels: [n] int64.
    """

    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, lm_head: Tensor, states: Tensor, condition_next: Tensor, blank_logits: Tensor,
        offsets: Tensor, labels: Tensor,
    ) -> Tensor:  # fmt: skip
        vocab, size = lm_head.shape
        inputs = torch.cat((frames.to(lm_head.dtype), states.to(lm_head.dtype)), dim=1)
        weight = torch.cat((lm_head, condition_next[:vocab].to(lm_head.dtype)), dim=1)
        blanks = blank_logits.float() + states.float() @ condition_next[vocab].float()
        loss = inputs.new_zeros((), dtype=torch.float32)
        inputs_grad, blanks_grad = torch.empty_like(inputs), torch.empty_like(blanks)
        next_grad = torch.zeros_like(condition_next, dtype=torch.float32)
        for chunk in torch.arange(len(inputs)).split(max(1, LOGITS_PER_CHUNK // vocab)):
            rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
            chunk_labels = labels[rows, None]
            logits = torch.cat(((inputs[rows] @ weight.T).float().add_(offsets), blanks[rows, None]), dim=1)
            normalizer = logits.logsumexp(1, keepdim=True)
            loss += (normalizer - logits.gather(1, chunk_labels)).sum()
            # From here on `logits` holds their gradient.
            logits.sub_(normalizer).exp_()
            logits.scatter_add_(1, chunk_labels, logits.new_full(chunk_labels.shape, -1))
            blanks_grad[rows] = logits[:, vocab]
            tokens_grad = logits[:, :vocab].to(inputs.dtype)
            torch.mm(tokens_grad, weight, out=inputs_grad[rows])
            next_grad[:vocab] += tokens_grad.T @ inputs[rows, size:]
        next_grad[vocab] = blanks_grad @ states.float()
        states_grad = inputs_grad[:, size:].float() + blanks_grad[:, None] * condition_next[vocab].float()
        ctx.save_for_backward(
            inputs_grad[:, :size].to(frames.dtype),
            states_grad.to(states.dtype),
            next_grad.to(condition_next.dtype),
            blanks_grad.to(blank_logits.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        frames, states, condition_next, blank_logits = (saved * loss_grad for saved in ctx.saved_tensors)
        return frames, None, states, condition_next, blank_logits, None, None
