"""The walk: which path of each token tree the target itself would have sampled.

The tree is a function of the past alone, so sampling the target at a node and stepping to the child that
carries the sampled token is exact for any sampling parameters. vLLM's own `Sampler` draws every token, once,
with the history that plain decoding would have at that point. Where nothing but the noise depends on the history, the
tokens of all nodes are sampled in one call: otherwise the host waits for the GPU before each next token.

Letters: R requests of the batch, N nodes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, sample_with_exponential_noise
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler

from vllm_ctc_spec.engine.host_tree import HostTree

MOST_LOGITS = 1 << 26
"""Entries of [rows, V] that are sampled in one call: 256 MiB in float32, of which sampling holds three."""


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

    def follow(self, choices: list[int]) -> None:
        """choices: of every row of the batch."""
        while self.active:
            self.step(choices[self.row])


@dataclass(frozen=True)
class WalkOutput:
    sampler_output: SamplerOutput
    """`sampled_token_ids` [R, longest path + 1], padded with vLLM's placeholder."""
    accepted_nodes: list[list[int]]
    """Per request, the node indices of its accepted path."""


class TreeWalker:
    def __init__(self, sampler: Sampler, at_once: bool) -> None:
        """at_once: sample the tokens of all nodes in one call where no parameter depends on the path.

        For a GPU only. On a CPU no transfer is saved, nodes off the path would be sampled for nothing, and vLLM's CPU
        sampler draws its noise differently.
        """
        self.sampler = sampler
        self.at_once = at_once

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
        is_greedy = metadata.all_greedy and _is_plain(metadata)
        walks, row = [], 0
        for tree, discarded in zip(trees, is_discarded):
            walks.append(Walk(tree.children(), row, active=not discarded))
            row += len(tree.tokens) + 1
        logprobs = None
        if is_greedy:
            self._walk_greedy(logits, walks)
        elif self.at_once and _is_plain(metadata) and not _changes_probabilities(metadata):
            self._walk_at_once(logits, walks, trees, metadata)
        else:
            logprobs = self._walk_sampled(logits, walks, metadata, histories)
        return WalkOutput(
            SamplerOutput(sampled_token_ids=_pad([walk.tokens for walk in walks]), logprobs_tensors=logprobs),
            [walk.nodes for walk in walks],
        )

    def _walk_greedy(self, logits: Tensor, walks: list[Walk]) -> None:
        """Nothing depends on the path, so one argmax over all rows answers every node."""
        choices = self.sampler.greedy_sample(logits.to(torch.float32)).tolist()
        for walk in walks:
            walk.follow(choices)

    def _walk_at_once(
        self, logits: Tensor, walks: list[Walk], trees: Sequence[HostTree], metadata: SamplingMetadata
    ) -> None:
        """The tokens of `_walk_sampled`, with one wait for the device.

        The noise of a node depends on its depth alone. So each generator draws for all depths of its tree, and is set
        back to its state at the depth where the walk ends.
        """
        generators = [metadata.generators.get(index) if walk.active else None for index, walk in enumerate(walks)]
        num_rows = [1 + len(tree.tokens) for tree in trees]
        choices: list[Tensor] = []
        states: list[list[Tensor]] = []
        for requests in _split(num_rows, MOST_LOGITS // logits.shape[1]):
            at_request: list[int] = []
            at_noise: list[int] = []
            num_levels: list[int] = []
            for index in requests:
                first_level = sum(num_levels)
                at_request += [index] * num_rows[index]
                at_noise += [first_level, *(first_level + depth for depth in trees[index].depths)]
                num_levels.append(1 + max(trees[index].depths, default=0))
            first = walks[requests[0]].first_row
            rows = logits[first : first + len(at_request)].to(torch.float32)
            noise, drawn = self._noise(rows, num_levels, [generators[index] for index in requests])
            request_of, noise_of = async_tensor_h2d([at_request, at_noise], logits.device)
            choices.append(self._choose(rows, noise[noise_of], request_of, metadata))
            states += drawn
        tokens = torch.cat(choices).tolist()
        for walk, generator, own_states in zip(walks, generators, states):
            walk.follow(tokens)
            if generator is not None:
                generator.set_state(own_states[len(walk.tokens)])

    def _noise(
        self, like: Tensor, num_levels: list[int], generators: list[torch.Generator | None]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """[sum of levels, V], drawn as vLLM's `random_sample` does, and each generator's states, 1 + level of them."""
        dtype = torch.float64 if self.sampler.use_fp64_gumbel else torch.float32
        noise = like.new_empty(sum(num_levels), like.shape[1], dtype=dtype)
        if None in generators:
            noise.exponential_()
        states: list[list[Tensor]] = []
        for own, generator in zip(noise.split(num_levels), generators):
            states.append([])
            if generator is not None:
                states[-1].append(generator.get_state())
                for level in own:
                    level.exponential_(generator=generator)
                    states[-1].append(generator.get_state())
        return noise, states

    def _choose(self, logits: Tensor, noise: Tensor, at_request: Tensor, metadata: SamplingMetadata) -> Tensor:
        """[n, V], [n, V], [n] -> [n] int64: what vLLM's `Sampler.sample` draws in each row with the noise given."""

        def of_rows(setting: Tensor | None) -> Tensor | None:
            return None if setting is None else setting[at_request]

        temperature = of_rows(metadata.temperature)
        assert temperature is not None
        greedy = None if metadata.all_random else self.sampler.greedy_sample(logits)
        logits = self.sampler.apply_temperature(logits, temperature, metadata.all_random)
        logits = apply_top_k_top_p(logits, of_rows(metadata.top_k), of_rows(metadata.top_p))
        sampled = sample_with_exponential_noise(logits.softmax(dim=-1, dtype=torch.float32), noise)
        return sampled if greedy is None else torch.where(temperature < _SAMPLING_EPS, greedy, sampled)

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
        """One call of vLLM's sampler over the batch, one row per request.

        Requests whose walk has ended, and prompt chunks, keep their row but not their generator: a seeded generator
        draws once for each emitted token.
        """
        generators = {index: draw for index, draw in metadata.generators.items() if walks[index].active}
        if len(logits) > len(walks):
            # A copy, because the sampler writes into what it is given and there may be another level.
            logits = logits[async_tensor_h2d([walk.row for walk in walks], logits.device)]
        level = dataclasses.replace(metadata, generators=generators, spec_token_ids=[[] for _ in walks])
        return self.sampler(logits=logits, sampling_metadata=level)


def _is_plain(metadata: SamplingMetadata) -> bool:
    """The raw logits decide, and nobody asks for log probabilities."""
    thinking = metadata.thinking_budget_state_holder
    return (
        metadata.max_num_logprobs is None
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


def _changes_probabilities(metadata: SamplingMetadata) -> bool:
    """Whether a processor that keeps the argmax is active; such processors need one row per request."""
    return any(
        not isinstance(processor, MinPLogitsProcessor) or processor.min_p_count
        for processor in metadata.logitsprocs.argmax_invariant
    )


def _split(sizes: list[int], most: int) -> list[list[int]]:
    """Indices in order, in runs whose sizes sum to at most `most`, or of one."""
    runs: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        total += size
        if not runs or total > most:
            runs.append([])
            total = size
        runs[-1].append(index)
    return runs


def _pad(paths: list[list[int]]) -> Tensor:
    width = max(1, *(len(path) for path in paths))
    return torch.tensor([path + [PLACEHOLDER_TOKEN_ID] * (width - len(path)) for path in paths], dtype=torch.int32)


def _stack_logprobs(levels: list[LogprobsTensors | None]) -> LogprobsTensors | None:
    """Per-level rows [R, ...] -> rows in vLLM's order [R * levels, ...], request-major: on all levels or none."""
    present = [level for level in levels if level is not None]
    if not present:
        return None
    return LogprobsTensors(*(torch.stack([level[part] for level in present], 1).flatten(0, 1) for part in range(3)))
