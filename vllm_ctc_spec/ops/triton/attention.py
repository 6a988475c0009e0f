"""Tree attention in Triton: the rows of a token tree attend to their paged context and to each other.

Query heads that share a key-value head are rows of the same matrix product, so keys and values are read once per
key-value head. A program takes up to `block_m` of these rows and one split of the context, and computes an online
softmax over its tiles. The step's own keys and values, under the ancestor masks, are the last tile of the last split.
With more than one split, a second kernel merges their results.

A row stands at the position of its depth, which is the number of its ancestors: its first row right behind the
context. With a sliding window, tiles before that of the first row are not read.

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
from vllm_ctc_spec.ops.triton.launch import MERGE_WARPS, Launch, splits_of_window
from vllm_ctc_spec.ops.triton.tiles import LOG2_E, as_cached, attend_tile, count_bits, first_seen, tiles_of_split


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
    """Attention of the tree rows of a step. Writes these rows of `out` and returns it.

    query, out: [M, H, D]; key, value: [M, K, D], of the step's rows; any strides over rows and heads.
    kv_cache: [blocks, K, B, 2 * D], keys before values in the last dimension, of query's dtype or float8.
    batch: with a `launch`.
    scale multiplies the logits.
    sliding_window: number of positions that a row sees, its own among them; 0: all. The row's depth counts, so that a
    node sees what it would see as text.
    soft_cap > 0 bounds the scaled logits to soft_cap * tanh(logit / soft_cap).
    sinks: [H], of any dtype, one more logit of each head in the softmax, whose value is zero.
    k_scale, v_scale: [1] float32, the factors of a float8 cache. The step's own keys and values are rounded as the
    cache will store them, so that a row's result does not depend on whether its ancestors are already in the cache.
    """
    num_heads, num_kv_heads, head_size = query.shape[1], key.shape[1], query.shape[2]
    group, launch, num_requests = num_heads // num_kv_heads, batch.launch, batch.row_starts.shape[0]
    assert launch is not None
    num_splits = splits_of_window(launch, sliding_window)
    is_split = num_splits > 1
    partial = lse = None
    if is_split:
        partial = query.new_empty((query.shape[0], num_heads, num_splits, head_size), dtype=torch.float32)
        lse = partial.new_empty(partial.shape[:3])
    sizes = {
        "num_splits": num_splits,
        "MIN_TILES": launch.min_tiles,
        "BLOCK_N": launch.block_n,
        "HEAD_SIZE": head_size,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "WINDOW": sliding_window,
    }
    grid = (triton.cdiv(batch.max_rows * group, launch.block_m), num_kv_heads * num_splits, num_requests)
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
        sinks,
        batch.row_starts,
        batch.num_rows,
        batch.ancestor_masks,
        batch.context_lens,
        batch.block_table,
        scale,
        soft_cap,
        *out.stride()[:2],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *kv_cache.stride()[:3],
        batch.block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_SIZE=kv_cache.shape[2],
        HAS_SOFT_CAP=soft_cap > 0,
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
            BLOCK_S=triton.next_power_of_2(num_splits),
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
    sinks_ptr,
    row_starts_ptr,
    num_rows_ptr,
    masks_ptr,
    context_lens_ptr,
    block_table_ptr,
    scale,
    soft_cap,
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
    HAS_SOFT_CAP: tl.constexpr,
    FP8_MAX: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
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
    first_read, num_tiles, tiles_per_split = tiles_of_split(context_len, num_splits, MIN_TILES, BLOCK_N, WINDOW)
    first_tile = first_read + split * tiles_per_split
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
    if sinks_ptr is not None:
        # In one of the splits, or the merge would count them more than once.
        sinks = tl.load(sinks_ptr + heads, mask=is_row, other=float("-inf")).to(tl.float32) * LOG2_E
        top = tl.where(split == 0, sinks, top)
        total = tl.where(split == 0, 1.0, total)
    if WINDOW > 0:
        seen_from = context_len + count_bits(tl.load(masks_ptr + rows, mask=is_row, other=0)) - WINDOW
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
        if WINDOW > 0:
            # The cache may hold anything where no row looks.
            in_context &= positions >= first_seen(context_len, WINDOW)
        exists = in_context[:, None] & is_dim[None, :]
        keys = tl.load(keys_at, mask=exists, other=0.0).to(query.dtype)
        values = tl.load(keys_at + HEAD_SIZE, mask=exists, other=0.0).to(query.dtype)
        allowed = in_context[None, :]
        if WINDOW > 0:
            allowed &= positions[None, :] >= seen_from[:, None]
        top, total, acc = attend_tile(query, keys, values, allowed, scale, soft_cap, top, total, acc, HAS_SOFT_CAP)

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
            keys = as_cached(keys, k_scale_ptr, query, cache_ptr.dtype.element_ty, FP8_MAX)
            values = as_cached(values, v_scale_ptr, query, cache_ptr.dtype.element_ty, FP8_MAX)
        masks = tl.load(masks_ptr + rows, mask=is_row, other=0)
        allowed = (((masks[:, None] >> tail[None, :].to(tl.int64)) & 1) != 0) & in_tail[None, :]
        if (WINDOW > 0) & (WINDOW < BLOCK_T):
            # A larger window reaches from any row to all of its ancestors.
            tail_counts = count_bits(tl.load(masks_ptr + row_start + tail, mask=in_tail, other=0))
            allowed &= tail_counts[None, :] > (count_bits(masks) - WINDOW)[:, None]
        top, total, acc = attend_tile(query, keys, values, allowed, scale, soft_cap, top, total, acc, HAS_SOFT_CAP)

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
    WINDOW: tl.constexpr,
):
    """Merges the splits' results of one row and head, weighted by their shares of the softmax."""
    head = tl.program_id(0)
    request = tl.program_id(2)
    if tl.program_id(1) >= tl.load(num_rows_ptr + request):
        return
    row = tl.load(row_starts_ptr + request).to(tl.int64) + tl.program_id(1)
    context_len = tl.load(context_lens_ptr + request)
    first_read, num_tiles, tiles_per_split = tiles_of_split(context_len, num_splits, MIN_TILES, BLOCK_N, WINDOW)
    splits = tl.arange(0, BLOCK_S)
    # Splits that would begin after the last tile have written nothing.
    is_split = first_read + splits * tiles_per_split <= num_tiles
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
