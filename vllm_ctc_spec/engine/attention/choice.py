"""Which tree attention serves a target: that of its attention backend, or another kernel over the same cache."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec, iter_layer_specs

from vllm_ctc_spec.engine.attention.interface import TreeAttention, refuse_features


def attention_of_target(config: VllmConfig, kv_cache: KVCacheConfig, kernel: str) -> TreeAttention:
    """Needs the caches. Raises ValueError for targets and block sizes that we do not serve.

    kernel: one of ATTENTION_KERNELS that the device has.
    """
    check_specs([spec for group in kv_cache.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)])
    layers = get_layers_from_vllm_config(config, Attention)
    check_sizes(list(layers.values()), config.cache_config.block_size)
    groups = [[layers[name] for name in group.layer_names if name in layers] for group in kv_cache.kv_cache_groups]
    return tree_attention_of(groups, kernel)


def check_specs(specs: list[Any]) -> None:
    """Raises ValueError where a layer keeps something else than the keys and values of its context or a window of it.

    specs: vLLM's `KVCacheSpec` of the target's and the drafter's layers.
    """
    served = (FullAttentionSpec, SlidingWindowSpec)
    others = [type(spec).__name__ for spec in specs if type(spec) not in served]
    refuse_features({f"layers with a cache of vLLM's {name}": True for name in others})


def check_sizes(layers: list[Any], block_size: int) -> None:
    """Raises ValueError where the target's attention layers differ, or the backend's blocks are smaller than vLLM's."""
    caches = [layer.kv_cache for layer in layers]
    sizes = {(layer.num_heads, kv.shape[1], kv.shape[3], kv.dtype) for layer, kv in zip(layers, caches, strict=True)}
    refuse_features({"attention layers that differ in their heads or their cache's type": len(sizes) > 1})
    for own in {kv.shape[2] for kv in caches} - {block_size}:
        raise ValueError(
            f"block_size={block_size}: the attention backend splits blocks into pieces of {own}, which speculative "
            f'method "ctc" does not support. Set --block-size {own}.'
        )


def tree_attention_of(groups: list[list[Any]], kernel: str) -> TreeAttention:
    """Raises ValueError for backends without one. groups: the target's attention layers in each KV group."""
    layers = [layer for group in groups for layer in group]
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
    return chosen(*groups)
