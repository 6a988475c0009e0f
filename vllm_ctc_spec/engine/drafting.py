"""Drafting inside vLLM: target hidden states -> drafter frames -> token trees.

The drafter's keys and values live in vLLM's paged cache, in layers of their own that belong to a KV group as the
target's do; so prefix caching, chunked prefill and preemption hold for them as for the target. Its frames stay dense.

Letters: n verified rows, R drafting requests, T frames, H hidden size, V vocabulary without blank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits
from vllm_ctc_spec.drafter.modeling import CTCDrafter, Draft, KeyValue
from vllm_ctc_spec.engine.attention.interface import PagedContext, TreeAttention
from vllm_ctc_spec.engine.draft_head import draft_head, find_lm_head, head_rows
from vllm_ctc_spec.engine.graphs import Capture, DraftGraphs, DraftInputs
from vllm_ctc_spec.engine.host_tree import HostTree, pack, unpack
from vllm_ctc_spec.engine.proposer import NoAttention, TargetProposer
from vllm_ctc_spec.engine.tensor_parallel import split_layers

MAX_DEFERRED_ROWS = 1024
"""Verified rows that are kept, in steps without drafts, before the drafter's keys and values of them are stored."""

PREFIX = "ctc_drafter.layers"
"""Of the names that vLLM knows the drafter's layers by."""


@dataclass(frozen=True)
class VerifiedRows:
    """Rows of a step that are now certain: prompt tokens, anchors and accepted nodes."""

    hidden: Tensor
    """[n, H], of `CTCDrafter.fuse`; in memory of their own."""
    positions: Tensor
    """[n] int64"""
    slots: Tensor
    """[n] int64, where the drafter's keys and values of these positions go."""


@dataclass(frozen=True)
class DraftRequests:
    """Requests that draft after this step."""

    last_tokens: Tensor
    """[R, 2] int64: the token of the last verified position n, and the anchor, which the target has just sampled."""
    last_rows: Tensor
    """[R] int64, row in VerifiedRows of the last verified position n."""
    context: PagedContext
    """Lengths n + 1."""
    chain_only: list[bool]
    """Requests with structured output: the grammar's mask is made for a chain."""


class DrafterCacheLayer(AttentionLayerBase):
    """A layer of paged cache for the drafter, of exactly the kind of a target's layer, so that vLLM needs no group for
    it.
    """

    def __init__(self, like: Attention) -> None:
        self.like = like
        self.num_heads = like.num_heads
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.like.get_attn_backend()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return self.like.get_kv_cache_spec(vllm_config)


class CTCProposer(TargetProposer):
    """The class that vLLM instantiates for `method="custom_class"`; our runner calls its methods, vLLM none."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        self.deferred: list[VerifiedRows] = []
        self.num_deferred = 0
        """Rows of `deferred`, which are not stored yet."""
        self.graphs: DraftGraphs | None = None
        self.kv_group = 0
        """Index of the drafter's among vLLM's KV groups, once the layers have their caches."""
        self.defers = True
        """Whether verified rows of steps without drafts may wait. Not where KV groups share memory: a block that is
        given back may be another group's in the next step."""

    def load_model(self, target: Any) -> None:
        super().load_model(target)
        assert self.settings.drafter is not None
        self.drafter: CTCDrafter = load_drafter(self.settings.drafter, self.vllm_config.model_config.dtype)
        self.drafter.to(self.vllm_config.device_config.device)
        tokens = torch.arange(self.drafter.config.vocab_size, device=self.drafter.device)
        lm_head = find_lm_head(self.target, self.drafter)
        self.drafter.set_tables(self.target.embed_input_ids(tokens), head_rows(lm_head, self.drafter))
        self.head = draft_head(lm_head, self.drafter)
        split_layers(self.drafter)
        self.num_frames = self.drafter.config.num_frames
        num_ranks = self.vllm_config.parallel_config.tensor_parallel_size
        self.num_heads = self.drafter.config.num_attention_heads // num_ranks
        forward_context = self.vllm_config.compilation_config.static_forward_context
        attention_layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        # Of a target whose layers all have a window the drafter sees that window, too: a layer of another kind beside
        # them would make vLLM give each of the target's layers a group of its own.
        layers = list(attention_layers.values())
        like = next((layer for layer in layers if layer.sliding_window is None), layers[0])
        self.cache_layers = [DrafterCacheLayer(like) for _ in self.drafter.layers]
        for index, layer in enumerate(self.cache_layers, start=len(layers)):
            forward_context[f"{PREFIX}.{index}.attn"] = layer
        self.scale = self.drafter.config.head_dim**-0.5

    def defer(self, verified: VerifiedRows) -> None:
        """In place of `propose` in steps without drafts: the rows are stored later, those of many steps at once."""
        if not self.defers:
            self.store(verified)
            return
        # The runner's buffers of positions and slots are overwritten by the next step; hidden states are not in them.
        kept = VerifiedRows(verified.hidden, verified.positions.clone(), verified.slots.clone())
        self.deferred.append(kept)
        # Counted along, because a sum over all of them takes a measurable part of a small target's step.
        self.num_deferred += len(verified.slots)
        if self.num_deferred >= MAX_DEFERRED_ROWS:
            self._store_deferred()

    def _store_deferred(self) -> None:
        deferred, self.deferred, self.num_deferred = self.deferred, [], 0
        hidden, positions, slots = (
            torch.cat(rows) for rows in zip(*((rows.hidden, rows.positions, rows.slots) for rows in deferred))
        )
        if len(deferred) > 1:
            # A slot may have been given to another request meanwhile: its last row counts.
            last_rows = {slot: row for row, slot in enumerate(slots.tolist())}
            if len(last_rows) < len(slots):
                kept = async_tensor_h2d(list(last_rows.values()), slots.device)
                hidden, positions, slots = hidden[kept], positions[kept], slots[kept]
        self.store(VerifiedRows(hidden, positions, slots))

    def propose(self, verified: VerifiedRows, requests: DraftRequests | None) -> list[HostTree]:
        """Store the drafter's context of the verified rows, then one tree for each drafting request."""
        self.deferred.append(verified)
        self._store_deferred()
        if requests is None:
            return []
        inputs = DraftInputs(requests.last_tokens, verified.hidden[requests.last_rows], requests.context)
        return unpack(self.draft(inputs, requests.chain_only))

    def store(self, verified: VerifiedRows) -> None:
        """The drafter's keys and values of the verified rows; slots of -1 are left out."""
        for layer, own in zip(self.cache_layers, self.drafter.context(verified.hidden, verified.positions)):
            self.attention.write(layer.kv_cache, verified.slots, own.key, own.value)

    def draft(self, inputs: DraftInputs, chain_only: list[bool]) -> Tensor:
        """One tree for each of R requests, [R, 4 N + 1] of `pack`, on the device."""
        any_chain = any(chain_only)
        if not any_chain and self.graphs is not None and self.graphs.fits(inputs):
            return self.graphs(inputs)
        options = self.settings.options
        drafted, logits = self._draft(inputs)
        trees = self._build(drafted, logits, options)
        if any_chain:
            chains = self._build(drafted, logits, dataclasses.replace(options, tree="chain", retrieval="off"))
            only = async_tensor_h2d(chain_only, device=trees.device)
            trees = torch.where(only[:, None], chains, trees)
        return trees

    @torch.inference_mode()
    def profile(self, num_requests: int) -> None:
        """Draft for so many requests, to allocate what that takes; without attention, as there may be no cache yet."""
        attention, self.attention = self.attention, cast(TreeAttention, NoAttention())
        try:
            inputs = self._inputs(num_requests, num_blocks=1)
            zeros = torch.zeros_like(inputs.last_tokens)
            verified = VerifiedRows(inputs.hidden, zeros[:, 0], zeros[:, 0])
            requests = DraftRequests(inputs.last_tokens, zeros[:, 0], inputs.context, [False] * num_requests)
            self.propose(verified, requests)
        finally:
            self.attention = attention

    def choose_attention(self, kv_cache: KVCacheConfig) -> TreeAttention:
        attention = super().choose_attention(kv_cache)
        if window := self.cache_layers[0].like.sliding_window:
            attention.frames_features = {"sliding_window": window}
        self.kv_group = self._only_group(kv_cache)
        self.defers = len(kv_cache.kv_cache_groups) == 1
        return attention

    def _only_group(self, kv_cache: KVCacheConfig) -> int:
        """Of the drafter's layers. Raises ValueError where vLLM has put them into several."""
        own = [
            index
            for index, group in enumerate(kv_cache.kv_cache_groups)
            if any(name.startswith(PREFIX) for name in group.layer_names)
        ]
        if len(own) > 1:
            raise ValueError(
                f"drafter {self.settings.drafter!r} has {len(self.cache_layers)} layers, which vLLM keeps in several "
                "KV groups for this target, whose layers have different windows. Train a drafter of one layer for it."
            )
        return own[0]

    def warm_up_attention(self) -> None:
        """For trees and for the drafter's frames, before the first request; needs the caches."""
        super().warm_up_attention()
        max_len = self.vllm_config.model_config.max_model_len
        self.attention.warm_up(1 + self.num_frames, self.num_heads, max_len, is_target=False)

    @torch.inference_mode()
    def capture(self, max_requests: int, capture: Capture) -> None:
        """Capture drafting for up to `max_requests`, unless the host builds the tree; needs the cache."""
        if self.settings.options.tree == "template":
            return
        block_size = self.cache_layers[0].kv_cache.shape[2]
        num_blocks = -(-self.vllm_config.model_config.max_model_len // block_size)
        buffers = self._inputs(max_requests, num_blocks)

        def draft(inputs: DraftInputs) -> Tensor:
            return self._build(*self._draft(inputs), self.settings.options)

        self.graphs = DraftGraphs(draft, buffers, capture)

    def _inputs(self, num_requests: int, num_blocks: int) -> DraftInputs:
        """For requests whose context is one position of the block that vLLM reserves for padding."""
        weight = self.drafter.norm.weight
        tokens = torch.zeros(num_requests, 2, dtype=torch.int64, device=weight.device)
        table = torch.zeros(num_requests, num_blocks, dtype=torch.int32, device=weight.device)
        context = self.attention.context(table, tokens[:, 0], torch.ones_like(tokens[:, 0]))
        return DraftInputs(tokens, weight.new_zeros(num_requests, len(weight)), context)

    def _draft(self, inputs: DraftInputs) -> tuple[Draft, Tensor]:
        """All frames and their `emission_logits`."""
        context, num_rows = inputs.context, self.num_frames + 1
        frames = self.attention.frames(context, num_rows, self.num_heads, inputs.hidden.dtype)

        def attend(layer: int, query: Tensor, own: KeyValue) -> Tensor:
            cache = self.cache_layers[layer].kv_cache
            return self.attention.attend_frames(query, own.key, own.value, cache, frames, self.scale)

        # Flat, as the target asks: over several ranks vLLM compiles the look-up for a number of dimensions.
        embeddings = self.target.embed_input_ids(inputs.last_tokens.flatten()).unflatten(0, (-1, 2))
        drafted = self.drafter(embeddings, inputs.hidden, context.lens, attend)
        return drafted, emission_logits(self.drafter, drafted.frames, self.head)

    def _build(self, drafted: Draft, logits: Tensor, options: SpecOptions) -> Tensor:
        """[R, 4 N + 1], see `pack`."""
        return pack(draft_trees(self.drafter, drafted, logits, self.settings.num_nodes, options))
