"""vLLM's CPU attention backend, with rows of token trees attending to their ancestors.

Plain prefill, decode and chain rows keep vLLM's kernel. The cache of a layer is
[blocks, kv_heads, block, 2 * D] (vllm/v1/attention/backends/cpu_attn.py); per block and head the first half
holds the keys as [D, block] and the second the values as [block, D] when the kernel's isa is "vec", which is
why the builder chooses "vec" (isa "amx" interleaves tiles). `check_layout` proves it at start-up.

Letters: R tree requests, Q rows per request (padded), K key-value heads, D head size, B block size, L context.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_ctc_spec.engine.attention.interface import PagedContext, StepTrees, features_of, refuse_features
from vllm_ctc_spec.ops.reference import attend_with_bias, tail_bias, unpack_ancestor_masks

ISA = "vec"


@dataclass(frozen=True)
class TreeRows:
    """The rows of a step that belong to branching trees."""

    rows: Tensor
    """[R, Q] int64, index of each tree row in the step's batch; padding repeats the request's first row."""
    is_real: Tensor
    """[R, Q] bool"""
    context: PagedContext
    bias: Tensor
    """See ops.reference.tail_bias."""
    is_batch: bool
    """The rows are the whole batch, in order and without padding: no row is left for vLLM's own kernel."""

    def take(self, values: Tensor) -> Tensor:
        """[tokens, ...] -> [R, Q, ...]"""
        if self.is_batch:
            return values[: self.rows.numel()].unflatten(0, self.rows.shape)
        return values[self.rows]

    def put(self, output: Tensor, values: Tensor) -> None:
        """Write values [R, Q, ...] to their rows of output [tokens, ...]."""
        if self.is_batch:
            output[: self.rows.numel()] = values.flatten(0, 1)
        else:
            output[self.rows[self.is_real]] = values[self.is_real]


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    tree_rows: TreeRows | None = None


class TreeCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUMetadataBuilder]:
        return TreeCPUMetadataBuilder


def register() -> None:
    """Takes the place of CPU_ATTN, the only name that vLLM's CPU platform selects."""
    register_backend(
        AttentionBackendEnum.CPU_ATTN, f"{TreeCPUAttentionBackend.__module__}.{TreeCPUAttentionBackend.__name__}"
    )


class TreeCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.isa = ISA
        self._set_isa_to_layers(self.layer_names)
        check_layout(self.block_size, self.head_dim, self.dtype)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TreeAttentionMetadata:
        return TreeAttentionMetadata(**vars(super().build(common_prefix_len, common_attn_metadata, fast_build)))


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_features(features_of(self))

    @staticmethod
    def tree_attention(layers: list[Any]) -> CPUTreeAttention:
        return CPUTreeAttention(layers)

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TreeAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        trees = None if attn_metadata is None else attn_metadata.tree_rows
        if trees is None or not trees.is_batch:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if trees is not None:
            own = trees.take(key), trees.take(value)
            attended = attend_paged(trees.take(query), kv_cache, trees.context, *own, trees.bias, self.scale)
            trees.put(output, attended)
        return output


@dataclass(frozen=True)
class TreeFrames:
    """The drafter's rows, all of which see one another."""

    context: PagedContext
    bias: Tensor
    """See ops.reference.tail_bias."""


class CPUTreeAttention:
    """TreeAttention over caches of isa "vec"; a context's block table is int64."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        """The target's."""
        # Layers that share a cache must have their slots moved once.
        self.target_caches = list({layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers}.values())

    def attach(self, metadata: TreeAttentionMetadata, trees: StepTrees) -> None:
        metadata.tree_rows = self._tree_rows(metadata.block_table, trees)

    def _tree_rows(self, block_table: Tensor, trees: StepTrees) -> TreeRows:
        num_rows = max(map(len, trees.masks))
        rows = torch.tensor(trees.starts)[:, None].repeat(1, num_rows)
        is_real = torch.zeros(len(trees.masks), num_rows, dtype=torch.bool)
        # Padding rows see row 0, because a row that sees nothing is NaN.
        masks = torch.ones(len(trees.masks), num_rows, dtype=torch.int64)
        for row, own in enumerate(trees.masks):
            rows[row, : len(own)] += torch.arange(len(own))
            is_real[row, : len(own)] = True
            masks[row, : len(own)] = torch.tensor(own)
        layer = self.layers[0]
        block_size = layer.kv_cache.shape[2]
        num_blocks = -(-max(trees.context_lens) // block_size)
        lens = torch.tensor(trees.context_lens)
        context = self.context(block_table[:, :num_blocks], torch.tensor(trees.requests), lens)
        allowed, group = unpack_ancestor_masks(masks, num_rows), layer.num_heads // layer.num_kv_heads
        bias = tail_bias(lens, context.max_len(block_size), allowed, group, layer.dtype)
        return TreeRows(rows, is_real, context, bias, trees.are_whole_step and bool(is_real.all()))

    def context(self, block_table: Tensor, requests: Tensor, lens: Tensor) -> PagedContext:
        return PagedContext(block_table[requests].long(), lens)

    def frames(
        self, context: PagedContext, num_rows: int, num_heads: int, kv_cache: Tensor, dtype: torch.dtype
    ) -> TreeFrames:
        everything = torch.ones(len(context.lens), num_rows, num_rows, dtype=torch.bool)
        max_context, group = context.max_len(kv_cache.shape[2]), num_heads // kv_cache.shape[1]
        return TreeFrames(context, tail_bias(context.lens, max_context, everything, group, dtype))

    def attend_frames(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, frames: TreeFrames, scale: float
    ) -> Tensor:
        return attend_paged(query, kv_cache, frames.context, key, value, frames.bias, scale)

    def write(self, kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        write_cache(kv_cache, slots, key, value)

    def move(self, slots: Tensor, sources: list[list[int]], targets: list[list[int]]) -> None:
        move_slots(self.target_caches, *(slots[list(chain.from_iterable(rows))] for rows in (sources, targets)))


def attend_paged(
    query: Tensor, kv_cache: Tensor, context: PagedContext, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Query rows [R, Q, H, D] attend to their paged context and to own keys and values [R, Q, K, D]."""
    key_blocks, value_blocks = split_cache(kv_cache)
    keys = _join(key_blocks.transpose(-1, -2), context.block_table, key)
    values = _join(value_blocks, context.block_table, value)
    return attend_with_bias(query, keys, values, bias, scale)


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of one layer's cache: keys [blocks, K, D, B] and values [blocks, K, B, D]."""
    num_blocks, num_kv_heads, block_size, packed = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * packed // 2)
    keys = halves[:, :, 0].view(num_blocks, num_kv_heads, packed // 2, block_size)
    values = halves[:, :, 1].view(num_blocks, num_kv_heads, block_size, packed // 2)
    return keys, values


def _join(blocks: Tensor, block_table: Tensor, own: Tensor) -> Tensor:
    """Context of `blocks` [blocks, K, B, D] in the order of block_table [R, n], then own [R, Q, K, D].

    Returns [R, K, n * B + Q, D].
    """
    num_requests, num_blocks = block_table.shape
    _, num_kv_heads, block_size, head_size = blocks.shape
    length = num_blocks * block_size
    joined = own.new_empty(num_requests, num_kv_heads, length + own.shape[1], head_size)
    paged = joined[:, :, :length].unflatten(2, (num_blocks, block_size))
    paged.copy_(blocks[block_table].transpose(1, 2))
    joined[:, :, length:] = own.transpose(1, 2)
    return joined


def write_cache(kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Store key and value [n, K, D] at slots [n] int64, as vLLM's own kernel does."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, block_size * 2, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, ISA)


def move_slots(kv_caches: list[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of slots `sources` [n] to slots `targets` [n], in every layer.

    Each layer reads all before it writes any, so the two sets may overlap.
    """
    block_size = kv_caches[0].shape[2]
    source_block, source_offset = sources // block_size, sources % block_size
    target_block, target_offset = targets // block_size, targets % block_size
    for kv_cache in kv_caches:
        keys, values = split_cache(kv_cache)
        moved_keys = keys[source_block, :, :, source_offset]
        moved_values = values[source_block, :, source_offset]
        keys[target_block, :, :, target_offset] = moved_keys
        values[target_block, :, target_offset] = moved_values


def check_layout(block_size: int, head_size: int, dtype: torch.dtype) -> None:
    """Write a known pattern with vLLM's kernel and read it through our views. Raises RuntimeError."""
    num_tokens = 2 * block_size
    cache = torch.zeros(2, 2, block_size, 2 * head_size, dtype=dtype)
    # A generator of its own: the engine's random state must be what it is without us.
    key, value = torch.randn(2, num_tokens, 2, head_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_cache(cache, torch.arange(num_tokens), key, value)
    keys, values = split_cache(cache)
    blocks, nothing = torch.arange(2)[None], key[None, :0]
    read_key = _join(keys.transpose(-1, -2), blocks, nothing)[0].transpose(0, 1)
    read_value = _join(values, blocks, nothing)[0].transpose(0, 1)
    if not (torch.equal(read_key, key) and torch.equal(read_value, value)):
        raise RuntimeError(
            f"vLLM's CPU cache (block size {block_size}, head size {head_size}, {dtype}) is not laid out as "
            f'speculative method "ctc" expects. Serve without speculative_config and report this machine\'s processor.'
        )
