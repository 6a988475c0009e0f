"""Plain PyTorch versions of the kernels: tree attention, and the move of accepted keys and values.

Letters: R requests, Q query rows per request, M query rows of the whole step, H query heads, K key-value heads,
G = H / K, D head size, L context, B block size, P places of a path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ctc_spec.ops.tree_batch import TreeBatch


def unpack_ancestor_masks(masks: Tensor, num_rows: int) -> Tensor:
    """[R, Q] int64 bitmasks (bit j: row sees row j) -> [R, Q, Q] bool."""
    bits = torch.arange(num_rows, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool()


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    batch: TreeBatch,
    scale: float,
    out: Tensor,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """As `ops.triton.attention.tree_attention`, one request at a time, in float64."""
    starts, counts, lens = (field.tolist() for field in (batch.row_starts, batch.num_rows, batch.context_lens))
    block_size, head_size = kv_cache.shape[2], query.shape[2]
    for request, (start, count, length) in enumerate(zip(starts, counts, lens)):
        own = slice(start, start + count)
        # What the first row does not see, no row does, and it may not be in the cache any more.
        unseen = max(0, length + 1 - sliding_window) if sliding_window else 0
        context = torch.arange(unseen, length, device=query.device)
        blocks = batch.block_table[request][context // block_size].long()
        cached = kv_cache[blocks, :, context % block_size].double()
        keys = torch.cat((cached[..., :head_size], _as_cached(key[own], kv_cache.dtype, k_scale))).movedim(0, 1)
        values = torch.cat((cached[..., head_size:], _as_cached(value[own], kv_cache.dtype, v_scale))).movedim(0, 1)
        keys, values = keys * _factor(k_scale), values * _factor(v_scale)
        logits = scale * (query[own].double().unflatten(1, (len(keys), -1)).movedim(0, 2) @ keys[:, None].mT)
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        sees_rows = unpack_ancestor_masks(batch.ancestor_masks[None, own], count)[0]
        sees = torch.cat((sees_rows.new_ones(count, len(context)), sees_rows), dim=1)
        if sliding_window:
            row_positions = length - 1 + sees_rows.sum(1)
            sees &= torch.cat((context, row_positions)) > row_positions[:, None] - sliding_window
        logits.masked_fill_(~sees, -torch.inf)
        if sinks is not None:
            sink = sinks.double().view(len(keys), -1, 1, 1).expand(-1, -1, count, 1)
            logits = torch.cat((logits, sink), dim=-1)
        # Softmax gives NaN for a row that sees nothing; its result is 0.
        weights = logits.softmax(-1).nan_to_num(0.0)[..., : keys.shape[1]]
        out[own] = (weights @ values[:, None]).movedim(2, 0).flatten(1, 2).to(out.dtype)
    return out


def _as_cached(rows: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """`rows` rounded as a cache of `dtype` stores them, before the multiplication with `scale`, in float64."""
    if dtype.itemsize > 1:
        return rows.double()
    largest = torch.finfo(dtype).max
    return (rows.float() / _factor(scale)).clamp(-largest, largest).to(dtype).double()


def _factor(scale: Tensor | None) -> Tensor | float:
    return 1.0 if scale is None else scale


def move_slots(kv_caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """As `ops.triton.move.move_slots`. kv_caches: [blocks, K, B, 2 * D] each; sources, targets: [R, P] int64."""
    moves = sources >= 0
    block_size = kv_caches[0].shape[2]
    source, target = sources[moves], targets[moves]
    for kv_cache in kv_caches:
        kv_cache[target // block_size, :, target % block_size] = kv_cache[source // block_size, :, source % block_size]
