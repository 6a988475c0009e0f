"""Tree attention in Triton: the rows of a token tree attend to their paged context and to each other.

Query heads that share a key-value head are rows of the same matrix product, so keys and values are read once per
key-value head. A program takes up to `block_m` of these rows and one split of the context, and computes an online
softmax over its tiles. The step's own keys and values, under the ancestor masks, are the last tile of the last split.
With more than one split, a second kernel merges their results.

All that changes from step to step is read on the device, so a launch can be captured in a CUDA graph. The plain twin
is `ops.reference.tree_attention`.

Letters: R requests, M query rows of the whole step, H query heads, K key-value heads, G = H / K, D head size,
B block size, S splits.
"""

# Triton reads the kernels' annotations as types of its own, so they cannot be typed for mypy.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.launch import MERGE_WARPS, Launch


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
    """Attention of the tree rows of a step. Writes these rows of `out` and returns it.

    query, out: [M, H, D]; key, value: [M, K, D], of the step's rows; any strides over rows and heads.
    kv_cache: [blocks, K, B, 2 * D], keys before values in the last dimension, of query's dtype or float8.
    batch: with a `launch`.
    scale multiplies the logits; softcap > 0 then bounds them to softcap * tanh(logit / softcap).
    k_scale, v_scale: [1] float32, the factors of a float8 cache. The step's own keys and values are rounded as the
    cache will store them, so that a row's result does not depend on whether its ancestors are already in the cache.
    """
    num_heads, num_kv_heads, head_size = query.shape[1], key.shape[1], query.shape[2]
    group, launch, num_requests = num_heads // num_kv_heads, batch.launch, batch.row_starts.shape[0]
    assert launch is not None
    is_split = launch.num_splits > 1
    partial = lse = None
    if is_split:
        partial = query.new_empty((query.shape[0], num_heads, launch.num_splits, head_size), dtype=torch.float32)
        lse = partial.new_empty(partial.shape[:3])
    sizes = {
        "num_splits": launch.num_splits,
        "MIN_TILES": launch.min_tiles,
        "BLOCK_N": launch.block_n,
        "HEAD_SIZE": head_size,
        "BLOCK_D": triton.next_power_of_2(head_size),
    }
    grid = (triton.cdiv(batch.max_rows * group, launch.block_m), num_kv_heads * launch.num_splits, num_requests)
    _attend_kernel[grid](
        out,
        partial,
        lse,
        query,
        key,
        value,
        kv_cache,
        k_scale,
        v_scale,
        batch.row_starts,
        batch.num_rows,
        batch.ancestor_masks,
        batch.context_lens,
        batch.block_table,
        scale,
        softcap,
        *out.stride()[:2],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *kv_cache.stride()[:3],
        batch.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=kv_cache.shape[2],
        HAS_SOFTCAP=softcap > 0,
        FP8_MAX=torch.finfo(kv_cache.dtype).max if kv_cache.dtype.itemsize == 1 else 0.0,
        IS_SPLIT=is_split,
        BLOCK_M=launch.block_m,
        BLOCK_T=_block_t(batch.max_rows),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **sizes,
    )
    if is_split:
        _merge_kernel[(num_heads, batch.max_rows, num_requests)](
            out,
            partial,
            lse,
            batch.row_starts,
            batch.num_rows,
            batch.context_lens,
            *out.stride()[:2],
            NUM_HEADS=num_heads,
            BLOCK_S=triton.next_power_of_2(launch.num_splits),
            num_warps=MERGE_WARPS,
            **sizes,
        )
    return out


def kernels_of(launch: Launch, max_rows: int) -> set[Hashable]:
    """Keys of the kernels that Triton compiles for `tree_attention`. Batches of many sizes share them."""
    kernels: set[Hashable] = {(replace(launch, num_splits=min(launch.num_splits, 2)), _block_t(max_rows))}
    if launch.num_splits > 1:
        kernels.add((launch.block_n, launch.min_tiles, triton.next_power_of_2(launch.num_splits)))
    return kernels


def _block_t(max_rows: int) -> int:
    """Size of the tile of the step's own keys. Triton's matrix product needs at least 16."""
    return max(16, triton.next_power_of_2(max_rows))


@triton.jit
def _tiles_of_split(context_len, num_splits, MIN_TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Number of context tiles, and number of tiles per split. The step's own keys are one tile after the context."""
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    return num_tiles, tl.maximum(tl.cdiv(num_tiles + 1, num_splits), MIN_TILES)


@triton.jit
def _attend_tile(query, keys, values, allowed, scale, softcap, top, total, acc, HAS_SOFTCAP: tl.constexpr):
    """One tile of the online softmax, in base 2. top, total: [rows] largest logit and sum of weights so far."""
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    logits = tl.where(allowed, logits * 1.4426950408889634, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    # While a row has seen no key, -inf - -inf would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _as_cached(tile, scale_ptr, like, element: tl.constexpr, FP8_MAX: tl.constexpr):
    """A tile as a float8 cache will store it, as vLLM does: divide, saturate, round."""
    scaled = tile.to(tl.float32) / tl.load(scale_ptr)
    return tl.clamp(scaled, -FP8_MAX, FP8_MAX).to(element).to(like.dtype)


@triton.jit(do_not_specialize=["num_splits", "block_table_row"])
def _attend_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    row_starts_ptr,
    num_rows_ptr,
    masks_ptr,
    context_lens_ptr,
    block_table_ptr,
    scale,
    softcap,
    out_row: tl.int64,
    out_head: tl.int64,
    query_row: tl.int64,
    query_head: tl.int64,
    key_row: tl.int64,
    key_head: tl.int64,
    value_row: tl.int64,
    value_head: tl.int64,
    cache_block: tl.int64,
    cache_head: tl.int64,
    cache_slot: tl.int64,
    block_table_row: tl.int64,
    num_splits,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FP8_MAX: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Programs that read the same keys are neighbours in launch order, so that all but the first find them in L2.
    kv_head = tl.program_id(1) % NUM_KV_HEADS
    split = tl.program_id(1) // NUM_KV_HEADS
    request = tl.program_id(2)
    num_rows = tl.load(num_rows_ptr + request)
    context_len = tl.load(context_lens_ptr + request)
    num_tiles, tiles_per_split = _tiles_of_split(context_len, num_splits, MIN_TILES, BLOCK_N)
    first_tile = split * tiles_per_split
    folded = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (tl.program_id(0) * BLOCK_M >= num_rows * GROUP) | (first_tile > num_tiles):
        return

    row_start = tl.load(row_starts_ptr + request).to(tl.int64)
    rows = row_start + folded // GROUP
    heads = kv_head * GROUP + folded % GROUP
    is_row = folded < num_rows * GROUP
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_SIZE
    query_at = query_ptr + rows[:, None] * query_row + heads[:, None] * query_head + dims[None, :]
    query = tl.load(query_at, mask=is_row[:, None] & is_dim[None, :], other=0.0)
    if FP8_MAX > 0:
        scale *= tl.load(k_scale_ptr)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The block table is read one tile ahead: loads of keys and values then depend on no other load of their
    # iteration, which Triton needs to pipeline them.
    table_at = block_table_ptr + request * block_table_row
    positions = first_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks = tl.load(table_at + positions // BLOCK_SIZE, mask=positions < context_len, other=0)
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, num_tiles)):
        positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_context = positions < context_len
        slots = blocks.to(tl.int64) * cache_block + kv_head * cache_head + (positions % BLOCK_SIZE) * cache_slot
        following = positions + BLOCK_N
        blocks = tl.load(table_at + following // BLOCK_SIZE, mask=following < context_len, other=0)
        keys_at = cache_ptr + slots[:, None] + dims[None, :]
        exists = in_context[:, None] & is_dim[None, :]
        keys = tl.load(keys_at, mask=exists, other=0.0).to(query.dtype)
        values = tl.load(keys_at + HEAD_SIZE, mask=exists, other=0.0).to(query.dtype)
        top, total, acc = _attend_tile(
            query, keys, values, in_context[None, :], scale, softcap, top, total, acc, HAS_SOFTCAP
        )

    if first_tile + tiles_per_split > num_tiles:
        tail = tl.arange(0, BLOCK_T)
        in_tail = tail < num_rows
        exists = in_tail[:, None] & is_dim[None, :]
        tail_rows = (row_start + tail)[:, None]
        keys = tl.load(key_ptr + tail_rows * key_row + kv_head * key_head + dims[None, :], mask=exists, other=0.0)
        values = tl.load(
            value_ptr + tail_rows * value_row + kv_head * value_head + dims[None, :], mask=exists, other=0.0
        )
        if FP8_MAX > 0:
            keys = _as_cached(keys, k_scale_ptr, query, cache_ptr.dtype.element_ty, FP8_MAX)
            values = _as_cached(values, v_scale_ptr, query, cache_ptr.dtype.element_ty, FP8_MAX)
        masks = tl.load(masks_ptr + rows, mask=is_row, other=0)
        allowed = (((masks[:, None] >> tail[None, :].to(tl.int64)) & 1) != 0) & in_tail[None, :]
        top, total, acc = _attend_tile(query, keys, values, allowed, scale, softcap, top, total, acc, HAS_SOFTCAP)

    acc /= tl.where(total > 0, total, 1.0)[:, None]
    if FP8_MAX > 0:
        acc *= tl.load(v_scale_ptr)
    if IS_SPLIT:
        partials = (rows * (NUM_KV_HEADS * GROUP) + heads) * num_splits + split
        tl.store(
            partial_ptr + partials[:, None] * HEAD_SIZE + dims[None, :], acc, mask=is_row[:, None] & is_dim[None, :]
        )
        tl.store(lse_ptr + partials, top + tl.log2(total), mask=is_row)
    else:
        out_at = out_ptr + rows[:, None] * out_row + heads[:, None] * out_head + dims[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    row_starts_ptr,
    num_rows_ptr,
    context_lens_ptr,
    out_row: tl.int64,
    out_head: tl.int64,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the splits' results of one row and head, weighted by their shares of the softmax."""
    head = tl.program_id(0)
    request = tl.program_id(2)
    if tl.program_id(1) >= tl.load(num_rows_ptr + request):
        return
    row = tl.load(row_starts_ptr + request).to(tl.int64) + tl.program_id(1)
    num_tiles, tiles_per_split = _tiles_of_split(tl.load(context_lens_ptr + request), num_splits, MIN_TILES, BLOCK_N)
    splits = tl.arange(0, BLOCK_S)
    # Splits that would begin after the last tile have written nothing.
    is_split = splits * tiles_per_split <= num_tiles
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_SIZE
    partials = (row * NUM_HEADS + head) * num_splits + splits
    lse = tl.load(lse_ptr + partials, mask=is_split, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    parts = tl.load(
        partial_ptr + partials[:, None] * HEAD_SIZE + dims[None, :],
        mask=is_split[:, None] & is_dim[None, :],
        other=0.0,
    )
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * out_row + head * out_head + dims, merged.to(out_ptr.dtype.element_ty), mask=is_dim)
