"""vLLM's CPU attention backend, with rows of token trees attending to their ancestors.

Plain prefill, decode and chain rows keep vLLM's kernel; rows of branching trees, and those decoded beside them, go to
`ops.cpu.kernels`. The cache of a layer is [blocks, K, B, 2 * D] (vllm/v1/attention/backends/cpu_attn.py). How keys and
values lie in it depends on the isa that vLLM's builder chooses for its kernel: in bfloat16 "amx" where the processor
has it, which we keep, and else one of many that differ by processor, in place of which we take "vec". `check_layout`
proves it at start-up.

Letters: R tree requests, Q rows of each, M rows of the whole step, K key-value heads, D head size, B block size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_ctc_spec.engine.attention.interface import TreeAttention, refuse_features, tree_rows, unsupported_features
from vllm_ctc_spec.ops.cpu import kernels as cpu_kernels
from vllm_ctc_spec.ops.tree_batch import TreeBatch

TILED_ISA, ISA = "amx", "vec"


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
    isa: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa != TILED_ISA or not cpu_kernels.multiplies_tiles():
            self.isa = ISA
            self._set_isa_to_layers(self.layer_names)
        check_layout(self.block_size, self.head_dim, self.dtype, self.isa)


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_features(unsupported_features(self))

    @staticmethod
    def tree_attention() -> type[CPUTreeAttention]:
        return CPUTreeAttention

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        trees = tree_rows(attn_metadata)
        if trees is None or not trees.are_whole_step:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if trees is not None:
            cpu_kernels.tree_attention(
                query,
                key,
                value,
                kv_cache,
                layer.isa == TILED_ISA,
                trees.batch,
                self.scale,
                output,
                # vLLM's is -1 where there is none.
                max(self.sliding_window, 0),
                self.logits_soft_cap,
                self.sinks,
            )
        return output


class CPUTreeAttention(TreeAttention):
    def __init__(self, *groups: list[Any]) -> None:
        super().__init__(*groups)
        self.isa: str = self.layer.isa
        self.is_tiled = self.isa == TILED_ISA
        # Compiled now, or a machine without a compiler would be found out by the first request.
        cpu_kernels.kernels()
        # Layers that share a cache must have their slots moved once.
        self.target_caches = {
            group: list({layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers}.values())
            for group, layers in self.groups.items()
        }

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
        cpu_kernels.tree_attention(query, key, value, kv_cache, self.is_tiled, batch, scale, out, **features)

    def write(self, kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        write_cache(kv_cache, slots, key, value, self.isa)

    def move(self, group: int, sources: Tensor, targets: Tensor) -> None:
        moves = sources >= 0
        cpu_kernels.move_slots(self.target_caches[group], self.is_tiled, sources[moves], targets[moves])


def write_cache(kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor, isa: str) -> None:
    """Store key and value [n, K, D] at slots [n] int64, as vLLM's own kernel does."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, block_size * 2, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)


def check_layout(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> None:
    """Write a known pattern with vLLM's kernel and read it through our views. Raises RuntimeError."""
    num_tokens = 2 * block_size
    cache = torch.zeros(2, 2, block_size, 2 * head_size, dtype=dtype)
    # A generator of its own: the engine's random state must be what it is without us.
    key, value = torch.randn(2, num_tokens, 2, head_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_cache(cache, torch.arange(num_tokens), key, value, isa)
    keys, values = cpu_kernels.joined_cache(cache, isa == TILED_ISA)
    found_key, found_value = keys.permute(0, 3, 1, 2).flatten(0, 1), values.permute(0, 2, 1, 3).flatten(0, 1)
    if not (torch.equal(found_key, key) and torch.equal(found_value, value)):
        raise RuntimeError(
            f"vLLM's CPU cache (block size {block_size}, head size {head_size}, {dtype}) is not laid out as "
            f'speculative method "ctc" expects. Serve without speculative_config and report this machine\'s processor.'
        )
