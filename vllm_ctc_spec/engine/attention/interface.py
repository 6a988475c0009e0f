"""What the runner and the proposer ask of attention, whatever the device, the kernels and the cache's layout.

Letters: R requests, Q query rows of each, M rows of the whole step, n rows, H query heads, K key-value heads,
D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_ctc_spec.ops.tree_batch import TreeBatch


@dataclass(frozen=True)
class PagedContext:
    """Where the contexts of R requests lie in the paged cache."""

    block_table: Tensor
    """[R, blocks of the longest context] int32"""
    lens: Tensor
    """[R] int32"""


@dataclass(frozen=True)
class StepTrees:
    """The branching trees of one step, on the host, and what else was taken from vLLM's kernel: see `Step`."""

    requests: list[int]
    """[R], index of each tree's request in the batch; a chain, and the only row of a request, are trees, too."""
    starts: list[int]
    """[R], first row of each, the anchor's, among the M rows of the step."""
    context_lens: list[int]
    """[R], verified positions of each, which all its rows see."""
    masks: list[list[int]]
    """R lists of one int64 bitmask per row, bit j: the row sees row j of its own request."""
    num_rows: int
    """M"""

    @property
    def are_whole_step(self) -> bool:
        """No row is left for vLLM's own kernel."""
        return sum(map(len, self.masks)) == self.num_rows


@dataclass(frozen=True)
class TreeRows:
    """The rows of a step that do not go to vLLM's kernel."""

    batch: TreeBatch
    are_whole_step: bool


def tree_rows(metadata: Any) -> TreeRows | None:
    """What `TreeAttention.attach` added to vLLM's metadata, whose classes differ from backend to backend."""
    return getattr(metadata, "tree_rows", None)


class TreeAttention(ABC):
    """One for the target's layers and the drafter's, whose caches have one layout. Tensors are on their device.

    The caches' second-last dimension is the block size.
    """

    def __init__(self, *groups: list[Any]) -> None:
        """groups: the target's attention layers in each of vLLM's KV groups; none in the drafter's own."""
        self.groups = {index: layers for index, layers in enumerate(groups) if layers}
        self.layers = [layer for layers in groups for layer in layers]
        self.layer = self.layers[0]
        self.frames_features: dict[str, Any] = {}
        """What the kernel takes beside, for the drafter's frames: a `sliding_window`, where they have one."""

    def warm_up(self, most_rows: int, num_heads: int, max_len: int, is_target: bool) -> None:
        """Compiles what is compiled for sizes: for up to so many rows of a request and positions of its context.

        is_target: for the target's layers, with the windows, soft caps and sinks that they have.
        """
        return None

    def metadata_of(self, by_layer: dict[str, Any]) -> list[Any]:
        """Of all layers' metadata that of the target's, each once: those of a KV group share one."""
        own = (by_layer[layer.layer_name] for layer in self.layers)
        return list({id(metadata): metadata for metadata in own}.values())

    def attach(self, metadata: list[Any], trees: StepTrees) -> None:
        """Makes the rows of `trees` attend to their ancestors in the forward pass with vLLM's `metadata`.

        Work that all layers share is done here, once. metadata: see `metadata_of`.
        """
        counts = [len(masks) for masks in trees.masks]
        ancestors = np.zeros(trees.num_rows, dtype=np.int64)
        for start, masks in zip(trees.starts, trees.masks):
            ancestors[start : start + len(masks)] = masks
        fields = np.array([trees.requests, trees.starts, counts, trees.context_lens])
        packed = async_tensor_h2d(np.concatenate((fields.ravel(), ancestors)), metadata[0].block_table.device)
        requests, starts, num_rows, lens = packed[: fields.size].view(fields.shape)
        num_blocks = -(-max(trees.context_lens) // self.layer.kv_cache.shape[2])
        batch = TreeBatch(
            row_starts=starts.int(),
            num_rows=num_rows.int(),
            ancestor_masks=packed[fields.size :],
            context_lens=lens.int(),
            block_table=metadata[0].block_table[requests, :num_blocks],
            max_rows=max(counts),
        )
        self.attach_batch(metadata, batch, requests, trees.are_whole_step)

    def attach_batch(self, metadata: list[Any], batch: TreeBatch, requests: Tensor, are_whole_step: bool) -> None:
        """`attach` of rows that are on the device.

        batch: with the block table of the first of `metadata`; requests: [R] int64, see `StepTrees`.
        """
        for own in metadata:
            if own is not metadata[0]:
                table = own.block_table[requests, : batch.block_table.shape[1]]
                batch = replace(batch, block_table=table)
            planned = self._planned(batch, self.layer.num_heads, self.layer.dtype)
            own.tree_rows = TreeRows(planned, are_whole_step)

    def context(self, block_table: Tensor, requests: Tensor, lens: Tensor) -> PagedContext:
        """Of rows `requests` [R] int64 of a block table [batch, blocks], which has no more blocks than are needed;
        lens: [R] int64, at least 1.
        """
        return PagedContext(block_table[requests], lens.int())

    def frames(self, context: PagedContext, num_rows: int, num_heads: int, dtype: torch.dtype) -> TreeBatch:
        """What `attend_frames` needs for Q rows of H heads for each request, made once for the drafter's layers."""
        num_requests, device = len(context.lens), context.lens.device
        batch = TreeBatch(
            row_starts=num_rows * torch.arange(num_requests, dtype=torch.int32, device=device),
            num_rows=torch.full((num_requests,), num_rows, dtype=torch.int32, device=device),
            ancestor_masks=torch.full((num_requests * num_rows,), (1 << num_rows) - 1, device=device),
            context_lens=context.lens,
            block_table=context.block_table,
            max_rows=num_rows,
        )
        return self._planned(batch, num_heads, dtype)

    def attend_frames(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, frames: TreeBatch, scale: float
    ) -> Tensor:
        """The Q rows of each request see its context and one another; returns like query.

        query: [R, Q, H, D]; key, value: [R, Q, K, D], the rows' own.
        """
        query, key, value = (rows.flatten(0, 1) for rows in (query, key, value))
        out = torch.empty_like(query)
        self._attend(query, key, value, kv_cache, frames, scale, out, **self.frames_features)
        return out.unflatten(0, (-1, frames.max_rows))

    def _planned(self, batch: TreeBatch, num_heads: int, dtype: torch.dtype) -> TreeBatch:
        """With what must be made before the kernel runs in the first layer."""
        return batch

    @abstractmethod
    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        batch: TreeBatch,
        scale: float,
        out: Tensor,
        **features: Any,
    ) -> None:
        """Of the drafter: query, out: [M, H, D]; key, value: [M, K, D]."""

    @abstractmethod
    def write(self, kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [n, K, D] at slots [n] int64 of a cache of the drafter."""

    def move_rows(self, slots: list[Tensor], sources: list[list[int]], targets: list[list[int]]) -> None:
        """Copy the target's keys and values, in every layer, from the slots of rows `sources` to those of `targets`.

        slots: [M] int64 of each KV group; sources, targets: for each request as many rows.
        """
        num_places = max(map(len, sources))
        padded = np.array([[[*path, *[-1] * (num_places - len(path))] for path in rows] for rows in (sources, targets)])
        rows = async_tensor_h2d(padded, slots[0].device)
        for group in self.groups:
            self.move(group, *torch.where(rows >= 0, slots[group][rows], -1))

    @abstractmethod
    def move(self, group: int, sources: Tensor, targets: Tensor) -> None:
        """Copy the target's keys and values, in every layer of a KV group, from slots `sources` to slots `targets`.

        [R, P] int64 each, -1 where nothing moves. All of a request is read before anything of it is written.
        """


def unsupported_features(impl: Any) -> dict[str, bool]:
    """What `refuse_features` takes, of any of vLLM's attention implementations."""
    return {
        "ALiBi": impl.alibi_slopes is not None,
        # Only TRITON_ATTN has it.
        "chunked attention": getattr(impl, "chunk_lookback", -1) >= 0,
    }


def refuse_features(features: dict[str, bool]) -> None:
    """features: what a layer's attention would have to do beside attending -> whether it must. Raises ValueError."""
    for name, present in features.items():
        if present:
            raise ValueError(
                f'the target has {name}, which speculative method "ctc" does not support. '
                f"Serve it without speculative_config, or with another method."
            )
