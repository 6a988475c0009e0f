"""Other attention kernels on the same steps.

Letters: R requests, Q rows per request, L context, H query heads, K key-value heads, G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import two_pass
from benchmarks.gpu.attention_steps import BLOCK_SIZE, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, SCALE, Step, unfold
from vllm_ctc_spec.ops.reference import unpack_ancestor_masks

Call = Callable[[], Any]


def sdpa(step: Step) -> Call:
    """torch's attention with an explicit mask, over keys and values that were gathered beforehand."""
    query, gathered, bias = step.folded_query(), _gather(step), _bias(step)
    return lambda: _attend_with_bias(query, *gathered, bias, step.batch.max_rows)


def gather_and_sdpa(step: Step) -> Call:
    query, bias = step.folded_query(), _bias(step)
    return lambda: _attend_with_bias(query, *_gather(step), bias, step.batch.max_rows)


def xformers(step: Step) -> Call:
    """xformers' own tree attention, which needs a contiguous context."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask
    from xformers.ops.tree_attention import tree_attention

    num_requests, num_rows, context = len(step.contexts), step.batch.max_rows, step.contexts[0]

    def grouped(rows: Tensor) -> Tensor:
        return rows[:, :, :, None].expand(-1, -1, -1, NUM_HEADS // NUM_KV_HEADS, -1)

    query = step.by_request(step.query).unflatten(2, (NUM_KV_HEADS, -1))
    own = [grouped(step.by_request(rows)) for rows in (step.key, step.value)]
    cached = [grouped(half.transpose(1, 2).contiguous()) for half in step.gathered_context()]
    prefix = BlockDiagonalPaddedKeysMask.from_seqlens([num_rows] * num_requests, context, [context] * num_requests)
    prefix = prefix.to(query.device)
    allowed = unpack_ancestor_masks(step.by_request(step.batch.ancestor_masks), num_rows)[0]
    tail = _aligned(torch.zeros_like(allowed, dtype=query.dtype).masked_fill_(~allowed, -torch.inf))
    return lambda: tree_attention(query, *own, *cached, tail, prefix)


def paged_xformers(step: Step) -> Call:
    """The kernel that the engine uses with attention_kernel="xformers"."""
    from vllm_ctc_spec.ops.xformers import pad_batch, tree_attention

    batch, out = pad_batch(step.batch, BLOCK_SIZE), torch.empty_like(step.query)
    return lambda: tree_attention(step.query, step.key, step.value, step.kv_cache, batch, SCALE, out)


def flash(step: Step) -> Call:
    """FlashAttention, causal over context and rows. It cannot mask a tree, so this only bounds what it could reach."""
    query, lens = step.by_request(step.query), step.batch.context_lens + step.batch.num_rows
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return _vllm_flash(step, lens)
    keys, values = (half.transpose(1, 2).contiguous() for half in _gather(step))
    return lambda: flash_attn_with_kvcache(query, keys, values, cache_seqlens=lens, causal=True)


def _vllm_flash(step: Step, lens: Tensor) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values = step.kv_cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
    starts = torch.cat((step.batch.row_starts, step.batch.row_starts[-1:] + step.batch.max_rows))
    longest = max(step.contexts) + step.batch.max_rows
    return lambda: flash_attn_varlen_func(
        step.query,
        keys,
        values,
        max_seqlen_q=step.batch.max_rows,
        cu_seqlens_q=starts,
        max_seqlen_k=longest,
        seqused_k=lens,
        block_table=step.batch.block_table,
        causal=True,
    )


BASELINES: dict[str, Callable[[Step], Call]] = {
    "flash ctx": lambda step: two_pass.context_alone(step, two_pass.flash),
    "flash+tail": lambda step: two_pass.two_pass(step, two_pass.flash),
    "cudnn+tail": lambda step: two_pass.two_pass(step, two_pass.cudnn),
    "sdpa": sdpa,
    "gather+sdpa": gather_and_sdpa,
    "xformers": xformers,
    "paged xformers": paged_xformers,
    "flash": flash,
}
"""Each takes a step whose requests have equally many rows and equally long contexts, and returns the call to time.
Raises ImportError where a library is not installed."""


def _gather(step: Step) -> list[Tensor]:
    """Keys and values [R, K, L + Q, D]: of the context, then of the step."""
    own = (step.by_request(rows).transpose(1, 2) for rows in (step.key, step.value))
    return [torch.cat(halves, dim=2) for halves in zip(step.gathered_context(), own)]


def _bias(step: Step) -> Tensor:
    """Additive mask [R, 1, Q * G, L + Q]: 0 where a row sees a position, -inf elsewhere."""
    rows, context = step.batch.max_rows, step.contexts[0]
    own = unpack_ancestor_masks(step.by_request(step.batch.ancestor_masks), rows)
    allowed = F.pad(own, (context, 0), value=True).repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)[:, None]
    return _aligned(torch.zeros_like(allowed, dtype=step.query.dtype).masked_fill_(~allowed, -torch.inf))


def _attend_with_bias(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, num_rows: int) -> Tensor:
    """Attention of query [R, K, Q * G, D] to keys and values [R, K, L + Q, D], as [R, Q, H, D]. bias: from `_bias`."""
    return unfold(F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=SCALE), num_rows)


def _aligned(bias: Tensor) -> Tensor:
    """The same with rows that start at multiples of 16 bytes; kernels would copy another layout first."""
    return F.pad(bias, (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]]
