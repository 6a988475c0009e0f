"""vLLM's Model Runner V2 with trees where it has chains.

One step, in the order of vLLM's `execute_model` and `sample_tokens` (vllm/v1/worker/gpu/model_runner.py): take up the
drafted trees and set their positions (`prepare_attn`), give attention their ancestor masks, walk them (`TreeVerifier`)
and move the accepted keys and values (`sample`), draft the next trees (`CTCSpeculator.propose`). The host schedules
nodes for every request and is told how many tokens came; it sees trees for an adaptive node budget only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vllm_ctc_spec.engine.adaptive.control import measured_control
from vllm_ctc_spec.engine.graphs import capture_drafting
from vllm_ctc_spec.engine.v2.adapters import TreeLoraState
from vllm_ctc_spec.engine.v2.host_budget import HostBudget
from vllm_ctc_spec.engine.v2.speculator import CTCSpeculator
from vllm_ctc_spec.engine.v2.verifier import TreeVerifier

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import DraftTokenIds


class TreeModelRunnerV2(GPUModelRunner):
    speculator: CTCSpeculator

    @property
    def drafter(self) -> Any:
        return self.speculator.drafter

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.speculator.load_model(self.model)
        if layers := self.drafter.settings.target_layers:
            self.model.set_aux_hidden_state_layers(layers)
            self.use_aux_hidden_state_outputs = True
        self.lora_state = TreeLoraState(self.max_num_reqs)
        self.rejection_sampler = TreeVerifier(self.sampler, self.speculator.trees)
        self._prepare_vllms_attention = self.model_state.prepare_attn
        # vLLM makes attention's metadata in the model's state, and has no hook of the runner after it.
        self.model_state.prepare_attn = self._prepare_tree_attention

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if not is_profiling:
            self.attention = self.drafter.choose_attention(self.kv_cache_config)
            self.speculator.block_tables = self.block_tables

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            slot = self.req_states.req_id_to_index[request.req_id]
            self.speculator.chain_only[slot] = request.sampling_params.structured_outputs is not None

    def prepare_attn(self, input_batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        prepared: tuple[tuple[Tensor, ...], Tensor] = super().prepare_attn(input_batch)
        self.speculator.trees.begin(input_batch)
        self.lora_state.num_logits = np.diff(input_batch.cu_num_logits_np)
        return prepared

    def _prepare_tree_attention(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        by_layer: dict[str, Any] = self._prepare_vllms_attention(input_batch, *args, **kwargs)
        trees = self.speculator.trees
        if trees.step is not None and trees.step.input_batch is input_batch:
            metadata = self.attention.metadata_of(by_layer)
            rows = trees.tree_batch(metadata[0].block_table, self.cache_config.block_size)
            self.attention.attach_batch(metadata, *rows)
        return by_layer

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        sampled = super().sample(*args, **kwargs)
        step = self.speculator.trees.step
        if step is not None:
            for group in self.attention.groups:
                slots = self.block_tables.slot_mappings[group, : step.num_rows]
                self.attention.move(group, *step.moves(slots))
        return sampled

    @property
    def adapts(self) -> bool:
        """Whether the node budget is adaptive."""
        return self.speculator.adapts

    def measure_step_cost(self) -> None:
        """Before the first request; needs the compiled model."""
        if self.adapts:
            control = measured_control(self, self._run_target)
            if control is not None:
                is_async = self.vllm_config.scheduler_config.async_scheduling
                self.speculator.budget = HostBudget(control, self.drafter.settings.num_nodes, is_async)

    @torch.inference_mode()
    def _run_target(self, num_rows: int) -> None:
        # With LoRA layers vLLM computes the logits of one row per request.
        self.drafter.target.compute_logits(self._dummy_run(num_rows)[0])
        torch.accelerator.synchronize()

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        drafts = super().take_draft_token_ids()
        budget = self.speculator.budget
        return drafts if budget is None or drafts is None else budget.cut(drafts)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        if output is not None and self.speculator.budget is not None:
            output.model_runner_output.node_counts = self.speculator.budget.node_counts
        return output

    def warm_up_drafting(self) -> None:
        capture_drafting(self)


class TreeCPUModelRunnerV2(TreeModelRunnerV2, CPUModelRunner):
    """For Triton's interpreter on vLLM's CPU backend."""

    def warm_up_drafting(self) -> None:
        self.drafter.profile(1)
