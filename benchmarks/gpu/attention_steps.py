"""Random steps of tree verification on the GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.launch import plan_launch

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5


@dataclass(frozen=True)
class Step:
    """The arguments of tree attention; every request has the same tree, as far as its rows reach."""

    query: Tensor
    key: Tensor
    value: Tensor
    kv_cache: Tensor
    batch: TreeBatch
    k_scale: Tensor | None
    v_scale: Tensor | None
    contexts: tuple[int, ...]

    def by_request(self, rows: Tensor) -> Tensor:
        """[R * rows, ...] -> [R, rows, ...], where all requests have equally many."""
        return rows.unflatten(0, (-1, self.batch.max_rows))


def make_step(
    num_rows: tuple[int, ...],
    contexts: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    head_size: int = HEAD_SIZE,
) -> Step:
    """Rows and contexts of each request, in blocks scattered over the cache."""
    random_on_gpu: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    total, device = sum(num_rows), torch.device("cuda", torch.cuda.current_device())
    # Room for the rows themselves, too: FlashAttention reads them from the cache.
    table_width = -(-(max(contexts) + max(num_rows)) // BLOCK_SIZE)
    num_blocks = table_width * len(contexts)
    # Heads inside of slots, as vLLM lays its caches out unless it is told otherwise.
    kv_cache = torch.randn(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, 2 * head_size, **random_on_gpu).transpose(1, 2)
    is_fp8 = cache_dtype is not None and cache_dtype.itemsize == 1
    scales = [torch.tensor([scale], device="cuda") if is_fp8 else None for scale in (0.75, 1.25)]
    shape = max(num_rows), max(contexts), NUM_HEADS, NUM_KV_HEADS, head_size, dtype, device
    starts = torch.tensor([0, *num_rows[:-1]]).cumsum(0)
    batch = TreeBatch(
        row_starts=starts.int().cuda(),
        num_rows=torch.tensor(num_rows, dtype=torch.int32, device="cuda"),
        ancestor_masks=torch.cat([ancestor_masks(max(num_rows))[:count] for count in num_rows]).cuda(),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        block_table=torch.randperm(num_blocks, device="cuda").int().view(len(contexts), -1),
        max_rows=max(num_rows),
        launch=plan_launch(len(num_rows), *shape),
    )
    query = torch.randn(total, NUM_HEADS, head_size, **random_on_gpu)
    key, value = torch.randn(2, total, NUM_KV_HEADS, head_size, **random_on_gpu)
    return Step(query, key, value, kv_cache.to(cache_dtype or dtype), batch, *scales, contexts)


def ancestor_masks(num_rows: int) -> Tensor:
    """[rows] int64 of one random tree, the same at every call."""
    rng, masks = random.Random(num_rows), [1]
    for row in range(1, num_rows):
        masks.append(masks[rng.randrange(row)] | 1 << row)
    return torch.tensor([mask - (mask >> 63 << 64) for mask in masks])
