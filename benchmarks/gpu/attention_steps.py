"""Random inputs of tree attention, with the heads of Llama-3-8B.

Letters: R requests, Q rows per request, M rows of the step, L context, H query heads, K key-value heads, G = H / K,
D head size, B block size.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.launch import chip_of, plan_launch

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5


@dataclass(frozen=True)
class Step:
    """The arguments of tree attention. All requests have the same tree, cut to their numbers of rows."""

    query: Tensor
    """[M, H, D]"""
    key: Tensor
    """[M, K, D]"""
    value: Tensor
    """[M, K, D]"""
    kv_cache: Tensor
    """[blocks, K, B, 2 * D]"""
    batch: TreeBatch
    k_scale: Tensor | None
    v_scale: Tensor | None
    contexts: tuple[int, ...]
    """Length of each request's context."""

    def by_request(self, rows: Tensor) -> Tensor:
        """[M, ...] -> [R, Q, ...], for steps whose requests have equally many rows."""
        return rows.unflatten(0, (-1, self.batch.max_rows))

    def folded_query(self) -> Tensor:
        """[R, K, Q * G, D]: the query heads of a key-value head as rows. For requests with equally many rows."""
        return self.by_request(self.query).unflatten(2, (NUM_KV_HEADS, -1)).transpose(1, 2).flatten(2, 3)

    def gathered_context(self) -> list[Tensor]:
        """Copies of keys and values, [R, K, L, D] each and contiguous. For requests with equally long contexts."""
        context = self.contexts[0]
        blocks = self.batch.block_table[:, : -(-context // BLOCK_SIZE)].long()
        pages = self.kv_cache[blocks].transpose(1, 2).flatten(2, 3)[:, :, :context]
        return [half.contiguous() for half in pages.split(HEAD_SIZE, dim=-1)]


def unfold(rows: Tensor, num_rows: int) -> Tensor:
    """[R, K, Q * G, D] -> [R, Q, H, D]"""
    return rows.unflatten(2, (num_rows, -1)).transpose(1, 2).flatten(2, 3)


def make_step(
    num_rows: tuple[int, ...],
    contexts: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    head_size: int = HEAD_SIZE,
    device: str = "cuda:0",
) -> Step:
    """A step with these numbers of rows and lengths of contexts, in blocks scattered over the cache."""
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    total = sum(num_rows)
    # With blocks for the rows too, which FlashAttention reads from the cache.
    table_width = -(-(max(contexts) + max(num_rows)) // BLOCK_SIZE)
    num_blocks = table_width * len(contexts)
    # In memory a slot holds all heads: vLLM's default layout (NHD).
    kv_cache = torch.randn(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, 2 * head_size, **options).transpose(1, 2)
    is_fp8 = cache_dtype is not None and cache_dtype.itemsize == 1
    scales = [torch.tensor([scale], device=device) if is_fp8 else None for scale in (0.75, 1.25)]
    shape = max(num_rows), max(contexts), NUM_HEADS, NUM_KV_HEADS, head_size, dtype, chip_of(torch.device(device))
    starts = torch.tensor([0, *num_rows[:-1]]).cumsum(0)
    batch = TreeBatch(
        row_starts=starts.int().to(device),
        num_rows=torch.tensor(num_rows, dtype=torch.int32, device=device),
        ancestor_masks=torch.cat([ancestor_masks(max(num_rows))[:count] for count in num_rows]).to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_table=torch.randperm(num_blocks, device=device).int().view(len(contexts), -1),
        max_rows=max(num_rows),
        launch=plan_launch(len(num_rows), *shape),
    )
    query = torch.randn(total, NUM_HEADS, head_size, **options)
    key, value = torch.randn(2, total, NUM_KV_HEADS, head_size, **options)
    return Step(query, key, value, kv_cache.to(cache_dtype or dtype), batch, *scales, contexts)


def ancestor_masks(num_rows: int) -> Tensor:
    """[num_rows] int64 of a random tree that depends on `num_rows` only."""
    rng, masks = random.Random(num_rows), [1]
    for row in range(1, num_rows):
        masks.append(masks[rng.randrange(row)] | 1 << row)
    return torch.tensor([mask - (mask >> 63 << 64) for mask in masks])
