"""The model runner: vLLM's own, with trees where it has chains.

One step, in the order of vLLM's `execute_model` and `sample_tokens`: lay out the scheduled trees
(`_prepare_inputs`), give attention their ancestor masks (`_build_attention_metadata`), walk them with vLLM's
sampler and move the accepted keys and values (`_sample`), draft the next trees (`propose_draft_token_ids`).
The scheduler sees lists of draft tokens and needs nothing else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ctc_spec.engine.attention.cpu import PagedContext, TreeAttentionMetadata, TreeRows, move_slots
from vllm_ctc_spec.engine.budget import NodeBudget, measure_target
from vllm_ctc_spec.engine.proposer import CTCProposer, DraftRequests, VerifiedRows
from vllm_ctc_spec.engine.sampler import EMPTY_TREE, HostTree, TreeWalker
from vllm_ctc_spec.ops.reference import tail_bias, unpack_ancestor_masks

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import SamplerOutput


@dataclass
class Step:
    """The requests of one step, in batch order."""

    trees: list[HostTree]
    starts: list[int]
    """First row of each request."""
    num_rows: list[int]
    num_computed: list[int]
    """Verified positions before this step: the position of each request's first row."""
    accepted_nodes: list[list[int]] = field(default_factory=list)

    def verified_rows(self, index: int) -> list[int]:
        """Rows of a request that are certain after the walk, by position."""
        start = self.starts[index]
        if not self.trees[index].tokens:
            return list(range(start, start + self.num_rows[index]))
        return [start, *(start + node for node in self.accepted_nodes[index])]


class TreeCPUModelRunner(CPUModelRunner):
    drafter: CTCProposer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.walker = TreeWalker(self.sampler)
        self.trees: dict[str, HostTree] = {}
        """The last tree drafted for each request; the scheduler holds its tokens, perhaps cut short."""
        self.step: Step | None = None
        self.budget: NodeBudget | None = None
        self.last_step: tuple[list[str], float] | None = None
        """Requests and end of the step before, if it decoded only."""

    def measure_step_cost(self) -> None:
        """Before the first request; needs the compiled model."""
        if self.drafter.settings.options.adapts:
            num_rows = self.max_num_reqs * (1 + self.drafter.settings.num_nodes)
            cost = measure_target(self._run_target, min(num_rows, self.max_num_tokens))
            self.budget = NodeBudget(cost)

    @torch.inference_mode()
    def _run_target(self, num_rows: int) -> None:
        self.model.compute_logits(self._dummy_run(num_rows)[0])

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if len(self.kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(
                'speculative method "ctc" needs a target whose attention layers are all of one kind; this one has '
                f"{len(self.kv_cache_config.kv_cache_groups)} groups. Serve it without speculative_config."
            )
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        self.group = next(layer.num_heads // layer.num_kv_heads for layer in layers)
        # Layers that share a cache must have their slots moved once.
        self.target_caches = list({layer.kv_cache.data_ptr(): layer.kv_cache for layer in layers}.values())

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        num_requests = self.input_batch.num_reqs
        self.step = Step(
            [self._scheduled_tree(request, scheduler_output) for request in self.input_batch.req_ids],
            self.query_start_loc.np[:num_requests].tolist(),
            num_scheduled_tokens.tolist(),
            self.input_batch.num_computed_tokens_cpu[:num_requests].tolist(),
        )
        # Padding must be a token that the embedding has; nothing can accept it, whatever it is.
        self.input_ids.gpu[: scheduler_output.total_num_scheduled_tokens].clamp_(min=0)
        for tree, start, computed in zip(self.step.trees, self.step.starts, self.step.num_computed):
            if not tree.is_chain:
                # Rotary positions follow depth; cache slots stay sequential, vLLM has already assigned them.
                depths = torch.tensor(tree.depths, device=self.positions.device)
                self.positions[start + 1 : start + 1 + len(tree.depths)] = computed + depths
        return prepared

    def _scheduled_tree(self, request: str, scheduler_output: SchedulerOutput) -> HostTree:
        tokens = scheduler_output.scheduled_spec_decode_tokens.get(request)
        if not tokens:
            return EMPTY_TREE
        if tokens[0] == PLACEHOLDER_TOKEN_ID:
            # A request that joins a running batch is padded to the node budget (vllm/v1/core/sched/scheduler.py).
            return HostTree.padding(tokens)
        drafted = self.trees[request].cut(len(tokens))
        assert drafted.tokens == tokens, (request, drafted.tokens, tokens)
        return drafted

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        attn_metadata, common = super()._build_attention_metadata(*args, **kwargs)
        if self.step is not None and any(not tree.is_chain for tree in self.step.trees):
            per_group = {id(metadata): metadata for metadata in attn_metadata.values()}
            for metadata in per_group.values():
                metadata.tree_rows = self._tree_rows(self.step, metadata)
        return attn_metadata, common

    def _tree_rows(self, step: Step, metadata: TreeAttentionMetadata) -> TreeRows:
        branching = [index for index, tree in enumerate(step.trees) if not tree.is_chain]
        num_rows = max(step.num_rows[index] for index in branching)
        rows = torch.tensor([step.starts[index] for index in branching])[:, None].repeat(1, num_rows)
        is_real = torch.zeros(len(branching), num_rows, dtype=torch.bool)
        # Padding rows see row 0, because a row that sees nothing is NaN.
        masks = torch.ones(len(branching), num_rows, dtype=torch.int64)
        for row, index in enumerate(branching):
            count = step.num_rows[index]
            rows[row, :count] += torch.arange(count)
            is_real[row, :count] = True
            masks[row, :count] = torch.tensor(step.trees[index].ancestor_masks())
        context = self._paged_context(
            branching, [step.num_computed[index] for index in branching], metadata.block_table
        )
        max_context = context.max_len(self.cache_config.block_size)
        bias = tail_bias(context.lens, max_context, unpack_ancestor_masks(masks, num_rows), self.group, self.dtype)
        is_batch = len(branching) == len(step.trees) and bool(is_real.all())
        return TreeRows(rows, is_real, context, bias, is_batch)

    def _paged_context(self, indices: list[int], lens: list[int], block_table: Tensor) -> PagedContext:
        num_blocks = -(-max(lens) // self.cache_config.block_size)
        return PagedContext(block_table[indices, :num_blocks].long(), torch.tensor(lens))

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        step = self.step
        assert step is not None and logits is not None
        walked = self.walker(
            logits,
            step.trees,
            self.input_batch.sampling_metadata,
            [self.requests[request].output_token_ids for request in self.input_batch.req_ids],
            self.discard_request_mask.np[: len(step.trees)].tolist(),
        )
        step.accepted_nodes = walked.accepted_nodes
        self._move_accepted(step)
        return walked.sampler_output

    def _move_accepted(self, step: Step) -> None:
        """Verification wrote node i's keys and values to the i-th slot; its place is the slot of its depth."""
        sources, targets = [], []
        for start, nodes in zip(step.starts, step.accepted_nodes):
            for depth, node in enumerate(nodes, 1):
                if node != depth:
                    sources.append(start + node)
                    targets.append(start + depth)
        if sources:
            slots = self.input_batch.block_table[0].slot_mapping.gpu
            move_slots(self.target_caches, slots[sources], slots[targets])

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM takes back the draw of a discarded sample, which its CPU generators cannot do (they have no offset).
        # The walk never draws for a discarded sample, so there is nothing to take back.
        generators, self.input_batch.generators = self.input_batch.generators, {}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators = generators

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # The scheduler cuts a tree at max_model_len; the drafter itself needs no slots.
        return True

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: Tensor,
        sample_hidden_states: Tensor,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> list[list[int]]:
        step, self.step = self.step, None
        assert step is not None
        rows: list[int] = []
        positions: list[int] = []
        slot_rows: list[int] = []
        lasts: list[int] = []
        for index, (start, computed) in enumerate(zip(step.starts, step.num_computed)):
            verified = step.verified_rows(index)
            rows.extend(verified)
            slot_rows.extend(range(start, start + len(verified)))
            positions.extend(range(computed, computed + len(verified)))
            lasts.append(len(rows) - 1)
        slots = self.input_batch.block_table[0].slot_mapping.gpu
        verified_rows = VerifiedRows(hidden_states[rows], torch.tensor(positions), slots[slot_rows])
        rests = self.budget is not None and not self.budget.wants_drafts(len(step.trees))
        drafting = [
            index for index, tokens in enumerate(sampled_token_ids) if tokens and not rests and self._may_draft(index)
        ]
        trees: list[HostTree] = []
        if rests and self._has_same_requests():
            self.drafter.remember(verified_rows)
        else:
            requests = self._draft_requests(drafting, lasts, positions, sampled_token_ids, common_attn_metadata)
            trees = self.drafter.propose(verified_rows, requests)
        if self.budget is not None:
            self._observe(self.budget, step)
            trees = _cut(self.budget, trees, len(step.trees))
        self.trees = {request: tree for request, tree in self.trees.items() if request in self.requests}
        drafts: list[list[int]] = [[] for _ in step.trees]
        for index, tree in zip(drafting, trees):
            self.trees[self.input_batch.req_ids[index]] = tree
            drafts[index] = tree.tokens
        return drafts

    def _observe(self, budget: NodeBudget, step: Step) -> None:
        num_accepted = sum(len(nodes) for nodes in step.accepted_nodes)
        budget.observe_walk(sum(sum(tree.probabilities) for tree in step.trees), num_accepted)
        now = time.perf_counter()
        is_decode = sum(step.num_rows) == sum(1 + len(tree.tokens) for tree in step.trees)
        # With the same requests as in the step before, nothing has waited for work in between.
        if is_decode and self.last_step is not None and self._has_same_requests():
            budget.observe_step(len(step.trees) + num_accepted, now - self.last_step[1])
        self.last_step = (list(self.input_batch.req_ids), now) if is_decode else None

    def _has_same_requests(self) -> bool:
        """As the step before, which decoded only."""
        return self.last_step is not None and self.last_step[0] == self.input_batch.req_ids

    def _draft_requests(
        self, drafting: list[int], lasts: list[int], positions: list[int], sampled: list[list[int]], common: Any
    ) -> DraftRequests | None:
        if not drafting:
            return None
        lens = [positions[lasts[index]] + 1 for index in drafting]
        return DraftRequests(
            torch.tensor([sampled[index][-1] for index in drafting]),
            torch.tensor([lasts[index] for index in drafting]),
            self._paged_context(drafting, lens, common.block_table_tensor),
            [self._sampling_params(index).structured_outputs is not None for index in drafting],
        )

    def _sampling_params(self, index: int) -> Any:
        return self.requests[self.input_batch.req_ids[index]].sampling_params

    def _may_draft(self, index: int) -> bool:
        # vLLM counts thinking tokens per emitted chunk, so such a request decodes one token a step.
        return self._sampling_params(index).thinking_token_budget is None


def _cut(budget: NodeBudget, trees: list[HostTree], num_requests: int) -> list[HostTree]:
    """Each tree to the nodes that pay."""
    if not trees:
        return []
    probabilities = np.zeros((len(trees), max(len(tree.tokens) for tree in trees)))
    for row, tree in zip(probabilities, trees):
        row[: len(tree.tokens)] = tree.probabilities
    return [tree.cut(count) for tree, count in zip(trees, budget.choose(probabilities, num_requests).tolist())]
