"""vLLM's FLASH_ATTN and TRITON_ATTN backends, with rows of token trees attending to their ancestors.

Prefill, plain decode and chains keep vLLM's kernels; rows of branching trees, and those decoded beside them, go to
`ops.triton.attention`. Both backends keep a layer's cache as [blocks, K, B, 2 * D], keys before values in the last
dimension (vllm/v1/kv_cache_interface.py), in any physical order: our kernels follow the strides. `_check_layout` proves
it at start-up.

Letters: R requests, Q query rows of each, M rows of the whole step, P places of a path, H query heads,
K key-value heads, B block size, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_ctc_spec.engine.attention.interface import (
    PagedContext,
    TreeAttention,
    refuse_features,
    tree_rows,
    unsupported_features,
)
from vllm_ctc_spec.engine.row_counts import doublings
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.attention import kernels_of, tree_attention
from vllm_ctc_spec.ops.triton.launch import chip_of, most_splits, next_power_of_2, plan_launch
from vllm_ctc_spec.ops.triton.move import CacheTable, move_slots


class TreeAttentionImpl(AttentionImpl):
    """Before one of vLLM's implementations in the order of base classes."""

    kernel: Callable[..., Tensor] = staticmethod(tree_attention)
    """Takes what `ops.triton.attention.tree_attention` takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shares = {"layers that share their keys and values": self.kv_sharing_target_layer_name is not None}
        refuse_features(unsupported_features(self) | shares)
        features = {"sliding_window": self.sliding_window[0] + 1, "soft_cap": self.logits_soft_cap, "sinks": self.sinks}
        self.features = {name: each for name, each in features.items() if isinstance(each, Tensor) or each}
        """What the layer has of them, as the kernel takes it. vLLM's windows leave out the row's own position."""

    @staticmethod
    def tree_attention() -> type[TritonTreeAttention]:
        return TritonTreeAttention

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        trees = tree_rows(attn_metadata)
        if trees is None or not trees.are_whole_step:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if trees is not None:
            scale = self.scale
            if query.dtype != key.dtype:
                # vLLM quantizes queries for a float8 cache.
                query, scale = query.to(key.dtype), scale * layer._q_scale_float
            cache, scales = self.kernel_cache(kv_cache, layer)
            self.kernel(query, key, value, cache, trees.batch, scale, output, **self.features, **scales)
        return output

    def kernel_cache(self, kv_cache: Tensor, layer: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """A cache as the kernel takes it, and the scales of its keys and values, which an unquantized one lacks."""
        if is_quantized_kv_cache(self.kv_cache_dtype):
            return kv_cache.view(current_platform.fp8_dtype()), {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        return kv_cache, {}


class TreeFlashAttentionImpl(TreeAttentionImpl, FlashAttentionImpl):
    pass


class TreeTritonAttentionImpl(TreeAttentionImpl, TritonAttentionImpl):
    pass


class TreeFlashAttentionBackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        return TreeFlashAttentionImpl


class TreeTritonAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        return TreeTritonAttentionImpl


def register() -> None:
    """Takes the places of FLASH_ATTN and TRITON_ATTN; which of them serves, if any, stays vLLM's choice."""
    for name, backend in (
        (AttentionBackendEnum.FLASH_ATTN, TreeFlashAttentionBackend),
        (AttentionBackendEnum.TRITON_ATTN, TreeTritonAttentionBackend),
    ):
        register_backend(name, f"{backend.__module__}.{backend.__name__}")


class TritonTreeAttention(TreeAttention):
    """Over caches [blocks, K, B, 2 * D]."""

    def __init__(self, *groups: list[Any]) -> None:
        super().__init__(*groups)
        has_scales = any(each._k_scale.numel() > 1 for each in self.layers)
        refuse_features({"scales of each head for its K/V cache": has_scales})
        self.tables = {
            group: CacheTable.of([layer.kv_cache for layer in layers]) for group, layers in self.groups.items()
        }
        self.kinds = list({_compiled_for(layer.impl.features): layer.impl.features for layer in self.layers}.values())
        """`features` of the layers, of those that share their kernels once."""
        self.device = self.layer.kv_cache.device
        self.chip = chip_of(self.device)
        unit = torch.ones((), device=self.device)
        self.drafter_scales = SimpleNamespace(_k_scale=unit, _v_scale=unit)
        """The drafter's keys and values are its own, so the target's scales do not fit them."""
        self._check_layout()
        # Compiled now, or the first accepted branch would wait for it.
        nothing = torch.full((1, 1), -1, dtype=torch.int64, device=self.device)
        move_slots(self.tables[min(self.tables)], nothing, nothing)

    def warm_up(self, most_rows: int, num_heads: int, max_len: int, is_target: bool) -> None:
        for features in self.kinds if is_target else [self.frames_features]:
            self._warm_up(most_rows, num_heads, max_len, features)

    def _warm_up(self, most_rows: int, num_heads: int, max_len: int, features: dict[str, Any]) -> None:
        _, num_kv_heads, block_size, packed = self.layer.kv_cache.shape
        # One position of the block that vLLM keeps for padding.
        table = torch.zeros(1, -(-max_len // block_size), dtype=torch.int32, device=self.device)
        context = PagedContext(table, torch.ones_like(table[:, 0]))
        compiled: set[Hashable] = set()
        for num_rows in range(1, most_rows + 1):
            frames = self.frames(context, num_rows, num_heads, self.layer.dtype)
            assert frames.launch is not None
            most = most_splits(frames.launch, self._max_context(table), self.chip)
            # The next power of two, too.
            for num_splits in doublings(2 * most - 1):
                launch = replace(frames.launch, num_splits=num_splits)
                # The first rows have compiled what merges many splits, whose memory grows with the rows.
                if (kernels := kernels_of(launch, num_rows)) <= compiled:
                    continue
                compiled |= kernels
                query, key = (
                    torch.zeros(num_rows, heads, packed // 2, dtype=self.layer.dtype, device=self.device)
                    for heads in (num_heads, num_kv_heads)
                )
                batch = replace(frames, launch=launch)
                self._attend(query, key, key, self.layer.kv_cache, batch, 1.0, torch.empty_like(query), **features)

    def _planned(self, batch: TreeBatch, num_heads: int, dtype: torch.dtype) -> TreeBatch:
        _, num_kv_heads, _, packed = self.layer.kv_cache.shape
        max_context = self._max_context(batch.block_table)
        sizes = len(batch.block_table), batch.max_rows, max_context, num_heads, num_kv_heads, packed // 2
        return replace(batch, launch=plan_launch(*sizes, dtype, self.chip))

    def _max_context(self, block_table: Tensor) -> int:
        """Rounded up, so that few plans serve all steps."""
        return int(self.layer.kv_cache.shape[2]) * next_power_of_2(block_table.shape[1])

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
        cache, scales = self.layer.impl.kernel_cache(kv_cache, self.drafter_scales)
        self.layer.impl.kernel(query, key, value, cache, batch, scale, out, **features, **scales)

    def write(self, kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        self.layer.impl.do_kv_cache_update(self.drafter_scales, key, value, kv_cache, slots)

    def move(self, group: int, sources: Tensor, targets: Tensor) -> None:
        move_slots(self.tables[group], sources, targets)

    def _check_layout(self) -> None:
        """Write a known pattern with vLLM's kernel and read it through our view. Raises RuntimeError.

        It goes to the block that vLLM keeps for padding, which nothing reads, and is taken away again.
        """
        kv_cache = self.layer.kv_cache
        _, num_kv_heads, block_size, packed = kv_cache.shape
        generator = torch.Generator().manual_seed(0)
        # Whole numbers, which float8 has, too.
        pattern = torch.randint(-16, 17, (2, block_size, num_kv_heads, packed // 2), generator=generator)
        key, value = pattern.to(self.device, self.layer.dtype)
        self.write(kv_cache, torch.arange(block_size, device=self.device), key, value)
        cache, _ = self.layer.impl.kernel_cache(kv_cache, self.drafter_scales)
        found = cache[0].transpose(0, 1).to(self.layer.dtype)
        is_right = torch.equal(found, torch.cat((key, value), dim=-1))
        kv_cache[0].zero_()
        if not is_right:
            raise RuntimeError(
                f"the K/V cache of {self.layer.get_attn_backend().get_name()}, {tuple(kv_cache.shape)} with strides "
                f'{kv_cache.stride()}, is not laid out as speculative method "ctc" expects. '
                f"Serve without speculative_config and report this."
            )


def _compiled_for(features: dict[str, Any]) -> Hashable:
    """What Triton compiles the kernels for: the window itself, and whether there are the others."""
    return features.get("sliding_window"), "soft_cap" in features, "sinks" in features
