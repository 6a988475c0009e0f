"""Drafting inside vLLM: target hidden states -> drafter frames -> token trees.

The drafter's keys and values live in vLLM's paged cache, in layers of their own that share the target's KV
group; so prefix caching, chunked prefill and preemption hold for them as for the target. Its frames stay dense.

Letters: n verified rows, R drafting requests, T frames, H hidden size, V vocabulary without blank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_ctc_spec.algorithm import TokenTrees
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits
from vllm_ctc_spec.drafter.modeling import CTCDrafter, KeyValue
from vllm_ctc_spec.engine.attention.cpu import PagedContext, attend_paged, frame_bias, write_cache
from vllm_ctc_spec.engine.sampler import HostTree
from vllm_ctc_spec.engine.settings import EngineSettings

MOST_REMEMBERED = 32
"""Steps whose rows wait for the drafter's context while drafting rests."""


@dataclass(frozen=True)
class VerifiedRows:
    """Rows of a step that are now certain: prompt tokens, anchors and accepted nodes."""

    hidden: Tensor
    """[n, H], the target's last hidden states."""
    positions: Tensor
    """[n] int64"""
    slots: Tensor
    """[n] int64, where the drafter's keys and values of these positions go."""


@dataclass(frozen=True)
class DraftRequests:
    """Requests that draft after this step."""

    anchors: Tensor
    """[R] int64, the token that the target has just sampled."""
    last_rows: Tensor
    """[R] int64, row in VerifiedRows of the last verified position n."""
    context: PagedContext
    """Lengths n + 1."""
    wants_chain: list[bool]
    """Requests that can be verified as a chain only."""


class DrafterCacheLayer(AttentionLayerBase):
    """A layer of paged cache for the drafter, of exactly the target's kind, so that vLLM keeps one KV group."""

    def __init__(self, like: Attention) -> None:
        self.like = like
        self.num_heads = like.num_heads
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.like.get_attn_backend()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return self.like.get_kv_cache_spec(vllm_config)


class CTCProposer:
    """What vLLM instantiates for `method="custom_class"`; our runner calls `propose` with tensors."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.settings = EngineSettings.from_dict(vllm_config.additional_config["ctc_spec"])
        self.remembered: list[VerifiedRows] = []

    def load_model(self, target: nn.Module) -> None:
        self.target: Any = target
        self.drafter: CTCDrafter = load_drafter(self.settings.drafter, self.vllm_config.model_config.dtype)
        forward_context = self.vllm_config.compilation_config.static_forward_context
        attention_layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        like = next(iter(attention_layers.values()))
        self.cache_layers = [DrafterCacheLayer(like) for _ in self.drafter.layers]
        for index, layer in enumerate(self.cache_layers, start=len(attention_layers)):
            forward_context[f"ctc_drafter.layers.{index}.attn"] = layer
        self.scale = self.drafter.config.head_dim**-0.5

    def remember(self, verified: VerifiedRows) -> None:
        """In place of `propose` while nothing drafts: the drafter's context of the rows is made later, for many steps.

        Only as long as the requests stay the same, or the rows' slots may be given to others.
        """
        self.remembered.append(verified)
        if len(self.remembered) == MOST_REMEMBERED:
            self._store_remembered()

    def _store_remembered(self) -> None:
        if self.remembered:
            fields = zip(*((rows.hidden, rows.positions, rows.slots) for rows in self.remembered))
            self.remembered = []
            self._store(VerifiedRows(*map(torch.cat, fields)))

    def _store(self, verified: VerifiedRows) -> None:
        context = self.drafter.context(verified.hidden, verified.positions)
        for layer, own in zip(self.cache_layers, context):
            write_cache(layer.kv_cache, verified.slots, own.key, own.value)

    def propose(self, verified: VerifiedRows, requests: DraftRequests | None) -> list[HostTree]:
        """Store the drafter's context of the verified rows, then one tree for each drafting request."""
        # First, because their slots may have become those of these rows.
        self._store_remembered()
        self._store(verified)
        if requests is None:
            return []
        frames = self._frames(verified.hidden[requests.last_rows], requests)
        logits = emission_logits(self.drafter, frames, self.target.compute_logits)
        return self._trees(logits, requests)

    def _frames(self, hidden: Tensor, requests: DraftRequests) -> Tensor:
        """[R, T, H]"""
        config, context = self.drafter.config, requests.context
        block_size = self.cache_layers[0].kv_cache.shape[2]
        group = config.num_attention_heads // config.num_key_value_heads
        bias = frame_bias(context, block_size, config.num_frames + 1, group, hidden.dtype)

        def attend(layer: int, query: Tensor, own: KeyValue) -> Tensor:
            cache = self.cache_layers[layer].kv_cache
            return attend_paged(query, cache, context, own.key, own.value, bias, self.scale)

        return self.drafter(self.target.embed_input_ids(requests.anchors), hidden, context.lens, attend)

    def _trees(self, logits: Tensor, requests: DraftRequests) -> list[HostTree]:
        def draft(options: SpecOptions) -> list[HostTree]:
            return to_host(draft_trees(self.drafter, logits, requests.anchors, self.settings.num_nodes, options))

        trees = draft(self.settings.options)
        if any(requests.wants_chain):
            chains = draft(dataclasses.replace(self.settings.options, tree="chain"))
            trees = [chain if wanted else tree for chain, tree, wanted in zip(chains, trees, requests.wants_chain)]
        return trees


def to_host(trees: TokenTrees) -> list[HostTree]:
    fields = (trees.tokens, trees.parents, trees.depths, trees.prefix_logp.exp())
    rows = zip(*(field.tolist() for field in fields), strict=True)
    return [HostTree(*row).cut(count) for row, count in zip(rows, trees.num_nodes.tolist())]
