"""What drafting needs of the target, with or without a drafter."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_ctc_spec.engine.adapters import without_adapters
from vllm_ctc_spec.engine.attention.choice import attention_of_target
from vllm_ctc_spec.engine.attention.interface import PagedContext, TreeAttention
from vllm_ctc_spec.engine.graphs import Capture
from vllm_ctc_spec.engine.settings import EngineSettings


class TargetProposer:
    """The class that vLLM instantiates where there is no drafter: trees are those of retrieval.

    It has a drafter's methods, as far as the worker and the runner call them without asking whether there is one.
    """

    num_frames = 0
    """Of the drafter."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.settings = EngineSettings.from_dict(vllm_config.additional_config["ctc_spec"])
        self.attention: TreeAttention = cast(TreeAttention, NoAttention())
        """That of the target's backend, once the runner knows it: when the layers have their caches."""

    def load_model(self, target: Any) -> None:
        self.target = without_adapters(target)

    def choose_attention(self, kv_cache: KVCacheConfig) -> TreeAttention:
        """For the target's layers and a drafter's, which have their caches now. Raises ValueError, see
        `attention_of_target`.
        """
        self.attention = attention_of_target(self.vllm_config, kv_cache, self.settings.options.attention_kernel)
        return self.attention

    def warm_up_attention(self) -> None:
        """For trees, before the first request; needs the caches."""
        max_len = self.vllm_config.model_config.max_model_len
        self.attention.warm_up(1 + self.settings.num_nodes, self.attention.layer.num_heads, max_len, is_target=True)

    def profile(self, num_requests: int) -> None:
        """Draft for so many requests."""

    def capture(self, max_requests: int, capture: Capture) -> None:
        """Record drafting for up to so many requests."""

    def propose(self, *args: Any) -> Any:
        """vLLM requires the method of a proposer."""
        raise NotImplementedError


class NoAttention:
    """In place of TreeAttention while there is no cache."""

    def context(self, block_table: Tensor, requests: Tensor, lens: Tensor) -> PagedContext:
        return PagedContext(block_table, lens)

    def frames(self, *args: Any) -> None:
        return None

    def attend_frames(self, query: Tensor, *args: Any) -> Tensor:
        return query

    def write(self, *args: Any) -> None:
        return None
