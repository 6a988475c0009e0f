"""Which tree attention serves a target: that of its attention backend, or another kernel over the same cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_ctc_spec.engine.attention.interface import TreeAttention

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def attention_of_target(config: VllmConfig, kv_cache: KVCacheConfig, kernel: str) -> TreeAttention:
    """Needs the caches. Raises ValueError for targets and block sizes that we do not serve.

    kernel: one of ATTENTION_KERNELS that the device has.
    """
    if len(kv_cache.kv_cache_groups) != 1:
        raise ValueError(
            'speculative method "ctc" needs a target whose attention layers are all of one kind; this one has '
            f"{len(kv_cache.kv_cache_groups)} groups. Serve it without speculative_config."
        )
    layers = list(get_layers_from_vllm_config(config, Attention).values())
    check_block_size(layers, config.cache_config.block_size)
    return tree_attention_of(layers, kernel)


def check_block_size(layers: list[Any], block_size: int) -> None:
    """Raises ValueError where the backend's blocks are smaller than vLLM's. layers: the target's attention layers."""
    for own in {layer.kv_cache.shape[2] for layer in layers} - {block_size}:
        raise ValueError(
            f"block_size={block_size}: the attention backend splits blocks into pieces of {own}, which speculative "
            f'method "ctc" does not support. Set --block-size {own}.'
        )


def tree_attention_of(layers: list[Any], kernel: str) -> TreeAttention:
    """Raises ValueError for backends without one. layers: the target's attention layers."""
    for layer in layers:
        if not hasattr(layer.impl, "tree_attention"):
            raise ValueError(
                f'attention backend {layer.get_attn_backend().get_name()}: speculative method "ctc" needs FLASH_ATTN '
                f"or TRITON_ATTN. Set --attention-backend FLASH_ATTN."
            )
    chosen: type[TreeAttention] = layers[0].impl.tree_attention()
    if kernel == "xformers":
        from vllm_ctc_spec.engine.attention.xformers import XformersTreeAttention

        chosen = XformersTreeAttention
    return chosen(layers)
