"""Tree attention with xformers: its paged attention over the context, dense attention over the rows, and a merge.

An alternative to `ops.triton.attention` for steps in which every request has rows and a context. xformers compiles a
kernel for every number of requests, rows and blocks, so these are rounded up to powers of two. The added rows are
copies of existing rows and write the same results to the same places.

Letters: R requests, Q rows of each, M rows of the whole step, H query heads, K key-value heads, G = H / K, D head size,
B block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from xformers.ops.fmha import memory_efficient_attention_partial, merge_attentions, triton_splitk
from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask, _PaddedSeqLenInfo, _SeqLenInfo

from vllm_ctc_spec.ops.reference import unpack_ancestor_masks
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.launch import next_power_of_2


@dataclass(frozen=True, kw_only=True)
class PaddedBatch(TreeBatch):
    """A step with R and Q rounded up to powers of two."""

    rows: Tensor
    """[R, Q] int64, indices into the M rows."""
    sees: Tensor
    """[R, Q, Q] bool, true where a row sees a row of its request."""
    context: Any
    """xformers' attention bias for the paged context."""


def pad_batch(batch: TreeBatch, block_size: int) -> PaddedBatch:
    """Round a batch up. Copies nothing between host and device, so a CUDA graph can capture it.

    batch: every request has at least one row and a context.
    """
    num_requests, num_rows, num_blocks = (
        next_power_of_2(size) for size in (len(batch.row_starts), batch.max_rows, batch.block_table.shape[1])
    )
    device = batch.row_starts.device
    requests = torch.arange(num_requests, device=device).clamp_(max=len(batch.row_starts) - 1)
    row = torch.arange(num_rows, device=device)
    is_row = row < batch.num_rows[requests, None]
    rows = batch.row_starts[requests, None] + torch.where(is_row, row, 0)
    num_queries = num_requests * num_rows
    table = F.pad(batch.block_table[requests], (0, num_blocks - batch.block_table.shape[1]))
    lens = batch.context_lens[requests]
    # The kernels read the lengths on the device. The lengths on the host only bound the grid, so upper bounds suffice.
    padding = num_blocks * block_size
    queries = _SeqLenInfo(
        seqstart=num_rows * torch.arange(num_requests + 1, dtype=torch.int32, device=device),
        max_seqlen=num_rows,
        min_seqlen=num_rows,
        seqstart_py=list(range(0, num_queries + 1, num_rows)),
    )
    keys = _PaddedSeqLenInfo(
        seqstart=padding * torch.arange(num_requests + 1, dtype=torch.int32, device=device),
        max_seqlen=padding,
        min_seqlen=padding,
        seqstart_py=list(range(0, num_requests * padding + 1, padding)),
        seqlen=lens,
        seqlen_py=[padding] * num_requests,
        padding=padding,
    )
    return PaddedBatch(
        **vars(batch),
        rows=rows,
        sees=unpack_ancestor_masks(batch.ancestor_masks[rows], num_rows) & is_row[:, None],
        context=PagedBlockDiagonalPaddedKeysMask(queries, keys, table, block_size),
    )


def tree_attention(
    query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: PaddedBatch, scale: float, out: Tensor
) -> Tensor:
    """As `ops.triton.attention.tree_attention`, for bfloat16 and float16, without windows, soft caps, sinks and scales.

    kv_cache: [blocks, K, B, 2 * D] with `has_slots(kv_cache)`. batch: from `pad_batch`.
    """
    query, key, value = (own[batch.rows] for own in (query, key, value))
    query = query.unflatten(2, (key.shape[2], -1))
    context = memory_efficient_attention_partial(
        query.flatten(0, 1)[None],
        *_slots(kv_cache, query.shape[3]),
        batch.context,
        scale=scale,
        op=_operator(kv_cache.shape[2]),
        output_dtype=torch.float32,
    )
    tail = _attend_tail(query, key, value, batch.sees, scale)
    parts, weights = zip(context, tail)
    merged, _ = merge_attentions(torch.stack(parts), torch.stack(weights), write_lse=False)
    out[batch.rows.flatten()] = merged[0].flatten(1, 2).to(out.dtype)
    return out


def has_slots(kv_cache: Tensor) -> bool:
    """Whether the slots of a cache [blocks, K, B, 2 * D] have one stride across blocks, which xformers needs."""
    return kv_cache.stride(0) == kv_cache.shape[2] * kv_cache.stride(2)


def _slots(kv_cache: Tensor, group: int) -> list[Tensor]:
    """Views of keys and values, [1, blocks * B, K, G, D] each."""
    slots = kv_cache.transpose(1, 2)
    slots = slots.view(1, -1, *slots.shape[2:])
    return [half[:, :, :, None].expand(-1, -1, -1, group, -1) for half in slots.chunk(2, dim=-1)]


@cache
def _operator(block_size: int) -> Any:
    """The only xformers kernel for vLLM's block sizes, with the largest tile that divides a block."""
    block_n = next(size for size in (64, 32, 16) if block_size % size == 0)
    return type("PagedOp", (triton_splitk.FwOp,), {"BLOCK_N": block_n})


def _attend_tail(query: Tensor, key: Tensor, value: Tensor, sees: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of the rows to each other and its log-sum-exp, in the shapes of xformers' partial attention.

    query: [R, Q, K, G, D]; key, value: [R, Q, K, D]. Returns float32 [1, R * Q, K, G, D], float64 [1, K, G, R * Q].
    """
    query, key, value = query.float().movedim(1, 3), key.float().movedim(1, 2), value.float().movedim(1, 2)
    logits = scale * query @ key[:, :, None].mT
    logits = logits.masked_fill(~sees[:, None, None], -torch.inf)
    weight = logits.logsumexp(-1)
    attended = (logits - weight[..., None]).exp() @ value[:, :, None]
    return attended.movedim(3, 1).flatten(0, 1)[None], weight.movedim(0, 2).flatten(2)[None].double()
