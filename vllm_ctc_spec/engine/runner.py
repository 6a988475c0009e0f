"""The model runner: vLLM's own, with trees where it has chains.

One step, in the order of vLLM's `execute_model` and `sample_tokens`: lay out the scheduled trees
(`_prepare_inputs`), give attention their ancestor masks (`_build_attention_metadata`), walk them with vLLM's
sampler and move the accepted keys and values (`_sample`), draft the next trees (`propose_draft_token_ids`).
The scheduler sees lists of draft tokens and needs nothing else.

The trees of a step live on the host. On a GPU the host waits for the device where it reads the walk's choices (once,
or once for each token of the longest path where parameters of the batch see the path), once where it reads the drafted
trees (and once more for the chains of structured output), and where somebody asked for log probabilities. What the
device needs of the host's lists goes there without waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan
from vllm_ctc_spec.engine.adaptive.control import BudgetControl, measured_control
from vllm_ctc_spec.engine.drafting import CTCProposer, DraftRequests, VerifiedRows
from vllm_ctc_spec.engine.host_tree import EMPTY_TREE, HostTree
from vllm_ctc_spec.engine.retrieval import Retrieval, is_chain_only
from vllm_ctc_spec.engine.step import Step
from vllm_ctc_spec.engine.tensor_parallel import is_first_rank, of_first_rank
from vllm_ctc_spec.engine.walk import TreeWalker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import DraftTokenIds, SamplerOutput

logger = init_logger("vllm.ctc_spec")


class TreeModelRunner(GPUModelRunner):
    """Device-neutral: tensors are made on `self.device`, and attention is behind `attention.interface`."""

    drafter: CTCProposer
    speculative_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_aux_hidden_state_outputs = bool(self.drafter.settings.target_layers)
        self.walker = TreeWalker(self.sampler, at_once=self.device.type != "cpu")
        self.trees: dict[str, HostTree] = {}
        """The last tree drafted for each request; the scheduler holds its tokens, perhaps cut short."""
        self.step: Step | None = None
        self.control: BudgetControl | None = None
        """None where the node budget is fixed, and on other ranks than the first, which decides for all."""
        settings = self.drafter.settings
        self.retrieval: Retrieval | None = None
        """None where it is off, and on other ranks than the first."""
        if settings.options.retrieves and is_first_rank():
            self.retrieval = Retrieval(settings.options, settings.num_nodes)

    def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
        layers = self.drafter.settings.target_layers
        if layers:
            self.model.set_aux_hidden_state_layers(layers)

    @property
    def has_drafter(self) -> bool:
        """Whether there is one beside retrieval."""
        return self.drafter.settings.drafter is not None

    @property
    def adapts(self) -> bool:
        """Whether the node budget is adaptive."""
        return self.drafter.settings.options.adapts

    def measure_step_cost(self) -> None:
        """Before the first request; needs the compiled model."""
        if self.adapts:
            self.control = measured_control(self, self._run_target)
            self.maybe_remove_all_loras(self.lora_config)

    @torch.inference_mode()
    def _run_target(self, num_rows: int) -> None:
        # With LoRA layers vLLM computes the logits of one row per request, and makes adapters for each dummy run.
        self.drafter.target.compute_logits(self._dummy_run(num_rows, remove_lora=False)[0])
        self._sync_device()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if not is_profiling:
            self.attention = self.drafter.choose_attention(self.kv_cache_config)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        if self.retrieval is not None:
            self.retrieval.free(scheduler_output.finished_req_ids)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        config = self.speculative_config
        has_drafts = bool(scheduler_output.scheduled_spec_decode_tokens)
        if not has_drafts:
            # Else vLLM counts drafts although there are none, which takes a measurable part of a small target's step.
            self.speculative_config = None
        try:
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        finally:
            self.speculative_config = config
        num_requests = self.input_batch.num_reqs
        trees = [EMPTY_TREE] * num_requests
        if has_drafts:
            trees = [self._scheduled_tree(request, scheduler_output) for request in self.input_batch.req_ids]
        self.step = Step(
            trees,
            self.query_start_loc.np[:num_requests].tolist(),
            num_scheduled_tokens.tolist(),
            self.input_batch.num_computed_tokens_cpu[:num_requests].tolist(),
            accepted_nodes=[[]] * num_requests,
        )
        if not has_drafts:
            return prepared
        rows, positions = self.step.tree_positions()
        if rows:
            # Rotary positions follow depth; cache slots stay sequential, vLLM has already assigned them.
            at, values = async_tensor_h2d([rows, positions], self.device)
            self.positions[at] = values
        return prepared

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray
    ) -> SpecDecodeMetadata:
        """The last 1 + N rows of each request, in order: the walk needs none of the indices of vLLM's own sampler."""
        num_rows = num_draft_tokens + 1
        ends = num_rows.cumsum()
        rows = np.repeat(cu_num_scheduled_tokens - ends, num_rows) + np.arange(ends[-1])
        logits_indices = async_tensor_h2d(rows, device=self.device)
        unused = logits_indices[:0]
        return SpecDecodeMetadata(
            draft_token_ids=unused,
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=unused,
            cu_num_sampled_tokens=unused,
            target_logits_indices=unused,
            bonus_logits_indices=unused,
            logits_indices=logits_indices,
        )

    def _scheduled_tree(self, request: str, scheduler_output: SchedulerOutput) -> HostTree:
        tokens = scheduler_output.scheduled_spec_decode_tokens.get(request)
        if not tokens:
            return EMPTY_TREE
        drafted = self.trees.get(request, EMPTY_TREE).cut(len(tokens))
        if drafted.tokens == tokens:
            return drafted
        # A request that joins a running batch is padded to the node budget (vllm/v1/core/sched/scheduler.py).
        if tokens[0] != PLACEHOLDER_TOKEN_ID:
            logger.warning_once(
                "The scheduler's draft tokens are not those of the tree that was drafted. They are verified as a "
                "chain: answers stay exact, and fewer tokens are accepted. Please report this to vllm_ctc_spec."
            )
        return HostTree.chain(tokens)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        attn_metadata, common = super()._build_attention_metadata(*args, **kwargs)
        trees = self.step.branching_trees() if self.step is not None else None
        if trees is not None:
            self.attention.attach(self.attention.metadata_of(attn_metadata), trees)
        return attn_metadata, common

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        step = self.step
        assert step is not None and logits is not None
        discarded = self.discard_request_mask.np[: len(step.trees)]
        # vLLM's own sampler draws for discarded samples, too.
        if not step.num_nodes and not discarded.any():
            return super()._sample(logits, spec_decode_metadata)
        walked = self.walker(
            logits,
            step.trees,
            self.input_batch.sampling_metadata,
            [self.requests[request].output_token_ids for request in self.input_batch.req_ids],
            discarded.tolist(),
        )
        step.accepted_nodes = walked.accepted_nodes
        self._move_accepted(step)
        return walked.sampler_output

    def _move_accepted(self, step: Step) -> None:
        sources, targets = step.moves()
        if any(sources):
            slots = [table.slot_mapping.gpu for table in self.input_batch.block_table.block_tables]
            self.attention.move_rows(slots, sources, targets)

    def _to_list(self, sampled_token_ids: Tensor) -> list[list[int]]:
        # The walk's tokens are on the host already; vLLM would wait for the device.
        return sampled_token_ids.tolist()

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
        verified = None
        if self.has_drafter:
            verified = self._verified_rows(step, [hidden_states, *(aux_hidden_states or ())])
        drafts: list[list[int]] = [[] for _ in step.trees]
        drafting = [index for index, tokens in enumerate(sampled_token_ids) if tokens]
        states = [self.requests[self.input_batch.req_ids[index]] for index in drafting]
        control, plan = self.control, None
        if self.adapts:
            plan = of_first_rank(None if control is None else self._plan(control, len(step.trees), states))
            if plan is None or not plan.asks_drafter:
                if verified is not None:
                    self.drafter.defer(verified)
                verified = None
            if plan is None:
                if control is not None:
                    control.observe(step.ended(self.input_batch.req_ids, drafted=False))
                return drafts
        elif self.retrieval is not None:
            self.retrieval.find(states)
        trees: list[HostTree] = []
        if verified is not None:
            requests = self._draft_requests(step, drafting, states, sampled_token_ids)
            trees = self.drafter.propose(verified, requests)
        if self.retrieval is not None:
            trees = self.retrieval.join(states, trees)
        if control is not None and plan is not None:
            # Without a drafter a step in which nothing is found is a plain one.
            drafted = bool(trees) if plan.asks_drafter else any(tree.tokens for tree in trees)
            control.observe(step.ended(self.input_batch.req_ids, drafted))
            trees = control.cut(plan, trees)
        trees = of_first_rank(trees)
        self.trees = {request: tree for request, tree in self.trees.items() if request in self.requests}
        for index, tree in zip(drafting, trees):
            self.trees[self.input_batch.req_ids[index]] = tree
            drafts[index] = tree.tokens
        return drafts

    def _plan(self, control: BudgetControl, num_requests: int, states: list[Any]) -> DraftPlan | None:
        plan = control.plan(num_requests)
        if plan is None or self.retrieval is None:
            return plan
        self.retrieval.find(states)
        return control.with_retrieval(plan, self.retrieval.gain_of_drafter(states) if self.has_drafter else 0.0)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        # The scheduler has forgotten the drafts of the step before, so it need not be told that there are none.
        return super().take_draft_token_ids() if any(self._draft_token_ids or ()) else None

    def _verified_rows(self, step: Step, hidden_states: list[Tensor]) -> VerifiedRows:
        """hidden_states: [rows of the step, H] each, the last and those of the drafter's `target_layers`."""
        fuse = self.drafter.drafter.fuse
        slots = self.input_batch.block_table[self.drafter.kv_group].slot_mapping.gpu
        if not step.num_nodes:
            total = step.total_rows
            hidden = torch.cat([states[:total] for states in hidden_states], dim=-1)
            return VerifiedRows(fuse(hidden), self.positions[:total], slots[:total])
        at, at_slots, positions = async_tensor_h2d(step.verified_indices(), self.device)
        hidden = torch.cat([states[at] for states in hidden_states], dim=-1)
        return VerifiedRows(fuse(hidden), positions, slots[at_slots])

    def _draft_requests(
        self, step: Step, drafting: list[int], states: list[Any], sampled: list[list[int]]
    ) -> DraftRequests | None:
        if not drafting:
            return None
        last = step.last_rows(drafting)
        anchors = [sampled[index][-1] for index in drafting]
        packed = async_tensor_h2d([drafting, *last, anchors], self.device)
        at_request, at_row, at_verified, at_len, anchor = packed
        num_blocks = -(-max(last.lens) // self.cache_config.block_size)
        table = self.input_batch.block_table[self.drafter.kv_group].block_table.gpu
        last_tokens = self.input_ids.gpu[at_row].long()
        if self.supports_mm_inputs:
            # A prompt may end with an image, whose token need not have an embedding.
            last_tokens.clamp_(max=self.drafter.drafter.config.vocab_size - 1)
        return DraftRequests(
            torch.stack((last_tokens, anchor), dim=1),
            at_verified,
            self.attention.context(table[:, :num_blocks], at_request, at_len),
            [is_chain_only(state) for state in states],
        )
