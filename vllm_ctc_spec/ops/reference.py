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
    softcap: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """As `ops.triton.attention.tree_attention`, one request at a time, in float64."""
    starts, counts, lens = (field.tolist() for field in (batch.row_starts, batch.num_rows, batch.context_lens))
    block_size, head_size = kv_cache.shape[2], query.shape[2]
    for request, (start, count, length) in enumerate(zip(starts, counts, lens)):
        own = slice(start, start + count)
        positions = torch.arange(length, device=query.device)
        blocks = batch.block_table[request][positions // block_size].long()
        cached = kv_cache[blocks, :, positions % block_size].double()
        keys = torch.cat((cached[..., :head_size], _as_cached(key[own], kv_cache.dtype, k_scale))).movedim(0, 1)
        values = torch.cat((cached[..., head_size:], _as_cached(value[own], kv_cache.dtype, v_scale))).movedim(0, 1)
        keys, values = keys * _factor(k_scale), values * _factor(v_scale)
        logits = scale * (query[own].double().unflatten(1, (len(keys), -1)).movedim(0, 2) @ keys[:, None].mT)
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        logits[..., length:].masked_fill_(~unpack_ancestor_masks(batch.ancestor_masks[None, own], count)[0], -torch.inf)
        # Softmax gives NaN for a row that sees nothing; its result is 0.
        weights = logits.softmax(-1).nan_to_num(0.0)
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
