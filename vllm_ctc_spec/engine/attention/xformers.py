"""Tree rows and frames by xformers' kernels, over the caches of vLLM's FLASH_ATTN and TRITON_ATTN backends."""

from __future__ import annotations

from typing import Any

import torch

from vllm_ctc_spec.engine.attention.triton import TritonTreeAttention
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.xformers import PaddedBatch, has_slots, pad_batch, tree_attention

NAMES = {"sliding_window": "a sliding window", "soft_cap": "soft-capped logits", "sinks": "sinks"}


class XformersTreeAttention(TritonTreeAttention):
    def __init__(self, *groups: list[Any]) -> None:
        super().__init__(*groups)
        if not has_slots(self.layer.kv_cache):
            raise ValueError(
                f"attention_kernel='xformers' needs a K/V cache in which heads lie inside of slots; this one has "
                f"strides {self.layer.kv_cache.stride()}. Set VLLM_KV_CACHE_LAYOUT=NHD."
            )
        for layer in self.layers:
            for name in layer.impl.features:
                raise ValueError(
                    f"attention_kernel='xformers': the target's attention has {NAMES[name]}, which only our own kernel "
                    f"computes for trees. Leave it out."
                )
            layer.impl.kernel = tree_attention

    def warm_up(self, *sizes: Any, **kind: Any) -> None:
        """Nothing: xformers compiles for every number of requests, rows and blocks, which are too many beforehand."""

    def _planned(self, batch: TreeBatch, num_heads: int, dtype: torch.dtype) -> PaddedBatch:
        return pad_batch(batch, self.layer.kv_cache.shape[2])
