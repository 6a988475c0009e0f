"""Which tree attention serves a target: that of its attention backend, or another kernel over the same cache."""

from __future__ import annotations

from typing import Any

from vllm_ctc_spec.engine.attention.interface import TreeAttention


def check_block_size(layers: list[Any], block_size: int) -> None:
    """Raises ValueError where the backend's blocks are smaller than vLLM's. layers: the target's attention layers."""
    for own in {layer.kv_cache.shape[2] for layer in layers} - {block_size}:
        raise ValueError(
            f"block_size={block_size}: the attention backend splits blocks into pieces of {own}, which speculative "
            f'method "ctc" does not support. Set --block-size {own}.'
        )


def tree_attention_of(layers: list[Any], kernel: str) -> TreeAttention:
    """Raises ValueError for backends without one.

    layers: the target's attention layers; kernel: one of ATTENTION_KERNELS that the device has.
    """
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
