"""What the runner and the proposer ask of attention, whatever the device, the kernels and the cache's layout.

Letters: R requests, Q query rows of each, M rows of the whole step, n rows, H query heads, K key-value heads,
D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedContext:
    """Where the contexts of R requests lie in the paged cache."""

    block_table: Tensor
    """[R, blocks of the longest context]"""
    lens: Tensor
    """[R]"""


@dataclass(frozen=True)
class StepTrees:
    """The branching trees of one step, on the host; chains are plain causal rows and not among them."""

    requests: list[int]
    """[R], index of each tree's request in the batch."""
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


class TreeAttention(Protocol):
    """One for the target's layers and the drafter's, whose caches have one layout. Tensors are on their device."""

    def attach(self, metadata: Any, trees: StepTrees) -> None:
        """Makes the rows of `trees` attend to their ancestors in the forward pass with vLLM's `metadata`.

        Work that all layers share is done here, once.
        """

    def context(self, block_table: Tensor, requests: Tensor, lens: Tensor) -> PagedContext:
        """Of rows `requests` [R] int64 of a block table [batch, blocks], which has no more blocks than are needed;
        lens: [R] int64, at least 1.
        """

    def frames(self, context: PagedContext, num_rows: int, num_heads: int, kv_cache: Tensor, dtype: torch.dtype) -> Any:
        """What `attend_frames` needs for Q rows of H heads for each request, made once for the drafter's layers."""

    def attend_frames(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, frames: Any, scale: float
    ) -> Tensor:
        """The Q rows of each request see its context and one another; returns like query.

        query: [R, Q, H, D]; key, value: [R, Q, K, D], the rows' own.
        """

    def write(self, kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [n, K, D] at slots [n] int64 of a cache of the drafter."""

    def move(self, slots: Tensor, sources: list[list[int]], targets: list[list[int]]) -> None:
        """Copy the target's keys and values, in every layer, from the slots of rows `sources` to those of `targets`.

        slots: [M] int64; sources, targets: for each request as many rows. All is read before anything is written.
        """


def tree_attention_of(layers: list[Any]) -> TreeAttention:
    """The one that belongs to the backend of a target's attention layers. Raises ValueError for other backends."""
    for layer in layers:
        if not hasattr(layer.impl, "tree_attention"):
            raise ValueError(
                f'attention backend {layer.get_attn_backend().get_name()}: speculative method "ctc" needs FLASH_ATTN '
                f"or TRITON_ATTN. Set --attention-backend FLASH_ATTN."
            )
    attention: TreeAttention = layers[0].impl.tree_attention(layers)
    return attention


def features_of(impl: Any) -> dict[str, bool]:
    """What `refuse_features` takes, of any of vLLM's attention implementations."""
    return {
        "attention logit soft-capping": bool(impl.logits_soft_cap),
        "ALiBi": impl.alibi_slopes is not None,
        "attention sinks": impl.sinks is not None,
        "sliding-window attention": impl.sliding_window not in (-1, (-1, -1)),
    }


def refuse_features(features: dict[str, bool]) -> None:
    """features: what a layer's attention would have to do beside attending -> whether it must. Raises ValueError."""
    for name, present in features.items():
        if present:
            raise ValueError(
                f'the target has {name}, which speculative method "ctc" does not support. '
                f"Serve it without speculative_config, or with another method."
            )
