"""Tree attention in two passes: a library's dense attention over the context, then the step's own keys and a merge.

The alternative to `ops.triton.attention`, which does both in one kernel. Its context is contiguous here, not paged, and
grouped query heads are folded into rows beforehand: so its time is a lower bound of what FlashAttention-3 over vLLM's
pages, a masked tail and a merge would need.

Letters: R requests, Q rows per request, L context, H query heads, K key-value heads, G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention_steps import NUM_HEADS, NUM_KV_HEADS, SCALE, Step, unfold
from vllm_ctc_spec.ops.reference import unpack_ancestor_masks

Dense = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Unmasked attention of query [R, K, Q * G, D] to keys and values [R, K, L, D]: the result, of query's shape, and the
natural logarithm of the sum of exponentials, float32 [R, K, Q * G]."""


def flash(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's FlashAttention-2, which splits long contexts between processors."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    attended, lse, *_ = attend(query, keys, values, scale=SCALE)
    return attended, lse


def cudnn(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """By cuDNN's attention, as torch calls it."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    attended, lse, *_ = attend(query, keys, values, None, True, scale=SCALE)
    # Some versions of torch return it with a last dimension of size 1.
    return attended, lse.reshape(query.shape[:3])


def plain(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """In elementary operations, on any device."""
    logits = SCALE * query.float() @ keys.float().mT
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp() @ values.float()).to(query.dtype), lse


def two_pass(step: Step, dense: Dense) -> Callable[[], Tensor]:
    """The call to time. It returns [R, Q, H, D] for a step of equally many rows and equally long contexts."""
    num_rows = step.batch.max_rows
    query, (keys, values) = step.folded_query(), step.gathered_context()
    own = [step.by_request(rows).transpose(1, 2).contiguous() for rows in (step.key, step.value)]
    sees = unpack_ancestor_masks(step.by_request(step.batch.ancestor_masks), num_rows)
    sees = sees.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)[:, None]
    return lambda: _add_tail(query, *own, sees, *dense(query, keys, values), num_rows)


def context_alone(step: Step, dense: Dense) -> Callable[[], Any]:
    """The first pass without the second: a lower bound for every design that leaves the context to this kernel."""
    query, (keys, values) = step.folded_query(), step.gathered_context()
    return lambda: dense(query, keys, values)


@torch.compile(dynamic=True)
def _add_tail(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor, context: Tensor, context_lse: Tensor, num_rows: int
) -> Tensor:
    """Attention of rows to each other, merged with what `dense` returned for the context; [R, Q, H, D].

    query, context: [R, K, Q * G, D]; key, value: [R, K, Q, D]; sees: [R, 1, Q * G, Q] bool. A row sees itself.
    """
    logits = (SCALE * (query @ key.mT).float()).masked_fill(~sees, -torch.inf)
    tail_lse = logits.logsumexp(-1)
    tail = (logits - tail_lse[..., None]).exp().to(value.dtype) @ value
    lse = torch.logaddexp(context_lse, tail_lse)
    merged = (context_lse - lse).exp()[..., None] * context + (tail_lse - lse).exp()[..., None] * tail
    return unfold(merged.to(query.dtype), num_rows)
