"""The walk: which path of each token tree the target itself would have sampled.

The tree is a function of the past alone, so sampling the target at a node and stepping to the child that
carries the sampled token is exact for any sampling parameters. vLLM's own `Sampler` draws every token, once,
with the history that plain decoding would have at that point.

Letters: R requests of the batch, N nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler


@dataclass(frozen=True)
class HostTree:
    """One request's drafted tree on the host: node i in 1..N is entry i - 1."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    probabilities: list[float]
    """psi of each node, what the drafter believes that the target accepts it with; for a prefix tree descending."""

    @classmethod
    def padding(cls, tokens: list[int]) -> HostTree:
        """A chain that nothing can accept."""
        count = len(tokens)
        return cls(tokens, list(range(count)), list(range(1, count + 1)), [0.0] * count)

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(len(self.parents)))

    def cut(self, num_nodes: int) -> HostTree:
        return HostTree(
            self.tokens[:num_nodes], self.parents[:num_nodes], self.depths[:num_nodes], self.probabilities[:num_nodes]
        )

    def children(self) -> dict[tuple[int, int], int]:
        """(node, token) -> child"""
        return {(parent, token): node for node, (parent, token) in enumerate(zip(self.parents, self.tokens), 1)}

    def ancestor_masks(self) -> list[int]:
        """N + 1 bitmasks in int64, see TokenTrees.ancestor_masks; bit 63 is the sign."""
        masks = [1]
        for node, parent in enumerate(self.parents, 1):
            masks.append(masks[parent] | (1 << node))
        return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]


EMPTY_TREE = HostTree([], [], [], [])


@dataclass
class Walk:
    """Where one request is in its tree."""

    children: dict[tuple[int, int], int]
    first_row: int
    """Row of its anchor in the batch's logits; node i is i rows below."""
    nodes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    active: bool = True

    @property
    def row(self) -> int:
        return self.first_row + (self.nodes[-1] if self.nodes else 0)

    def step(self, token: int) -> None:
        self.tokens.append(token)
        child = self.children.get((self.nodes[-1] if self.nodes else 0, token))
        if child is None:
            self.active = False
        else:
            self.nodes.append(child)


@dataclass(frozen=True)
class WalkOutput:
    sampler_output: SamplerOutput
    """`sampled_token_ids` [R, longest path + 1], padded with vLLM's placeholder."""
    accepted_nodes: list[list[int]]
    """Per request, the node indices of its accepted path."""


class TreeWalker:
    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(
        self,
        logits: Tensor,
        trees: Sequence[HostTree],
        metadata: SamplingMetadata,
        histories: Sequence[list[int]],
        is_discarded: Sequence[bool],
    ) -> WalkOutput:
        """logits: [sum of N_r + 1, V]; histories: each request's output tokens, the lists that vLLM's metadata
        and processors refer to; is_discarded: prompt chunks, whose sample vLLM throws away.
        """
        is_greedy = _is_plain_greedy(metadata)
        if is_greedy and not any(tree.tokens for tree in trees):
            choices = self._greedy(logits)[:, None].to(torch.int32)
            return WalkOutput(SamplerOutput(sampled_token_ids=choices, logprobs_tensors=None), [[] for _ in trees])
        walks, row = [], 0
        for tree, discarded in zip(trees, is_discarded):
            walks.append(Walk(tree.children(), row, active=not discarded))
            row += len(tree.tokens) + 1
        logprobs = None
        if is_greedy:
            self._walk_greedy(logits, walks)
        else:
            logprobs = self._walk_sampled(logits, walks, metadata, histories)
        return WalkOutput(
            SamplerOutput(sampled_token_ids=_pad([walk.tokens for walk in walks]), logprobs_tensors=logprobs),
            [walk.nodes for walk in walks],
        )

    def _walk_greedy(self, logits: Tensor, walks: list[Walk]) -> None:
        """Nothing depends on the path, so one argmax over all rows answers every node."""
        choices = self._greedy(logits).tolist()
        for walk in walks:
            while walk.active:
                walk.step(choices[walk.row])

    def _greedy(self, logits: Tensor) -> Tensor:
        """[n] int64"""
        choices: Tensor = self.sampler.greedy_sample(logits.to(torch.float32))
        return choices

    def _walk_sampled(
        self, logits: Tensor, walks: list[Walk], metadata: SamplingMetadata, histories: Sequence[list[int]]
    ) -> LogprobsTensors | None:
        levels = []
        lengths = [len(history) for history in histories]
        try:
            while True:
                sampled = self._sample_level(logits, walks, metadata)
                levels.append(sampled.logprobs_tensors)
                for walk, history, token in zip(walks, histories, sampled.sampled_token_ids[:, 0].tolist()):
                    if walk.active:
                        history.append(token)
                        walk.step(token)
                if not any(walk.active for walk in walks):
                    return _stack_logprobs(levels)
                for processor in metadata.logitsprocs.all:
                    processor.update_state(None)
        finally:
            for history, length in zip(histories, lengths):
                del history[length:]

    def _sample_level(self, logits: Tensor, walks: list[Walk], metadata: SamplingMetadata) -> SamplerOutput:
        """One call of vLLM's sampler over the batch. Requests that have left their tree, and prompt chunks, ride
        along with their generator taken away: a seeded generator is drawn once for each emitted token, no more.
        """
        generators = {index: draw for index, draw in metadata.generators.items() if walks[index].active}
        if len(logits) > len(walks):
            # A copy, because the sampler writes into what it is given and there may be another level.
            logits = logits[async_tensor_h2d([walk.row for walk in walks], logits.device)]
        level = dataclasses.replace(metadata, generators=generators, spec_token_ids=[[] for _ in walks])
        return self.sampler(logits=logits, sampling_metadata=level)


def _is_plain_greedy(metadata: SamplingMetadata) -> bool:
    """Every token is the argmax of the raw logits, and nobody asks for log probabilities."""
    thinking = metadata.thinking_budget_state_holder
    return (
        metadata.all_greedy
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and (thinking is None or not thinking.has_tracked_requests())
        and not any(_may_change_argmax(processor) for processor in metadata.logitsprocs.non_argmax_invariant)
    )


def _may_change_argmax(processor: object) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    if isinstance(processor, LogitBiasLogitsProcessor):
        return bool(processor.biases)
    return True


def _pad(paths: list[list[int]]) -> Tensor:
    width = max(1, *(len(path) for path in paths))
    return torch.tensor([path + [PLACEHOLDER_TOKEN_ID] * (width - len(path)) for path in paths], dtype=torch.int32)


def _stack_logprobs(levels: list[LogprobsTensors | None]) -> LogprobsTensors | None:
    """Per-level rows [R, ...] -> rows in vLLM's order [R * levels, ...], request-major: on all levels or none."""
    present = [level for level in levels if level is not None]
    if not present:
        return None
    return LogprobsTensors(*(torch.stack([level[part] for level in present], 1).flatten(0, 1) for part in range(3)))
