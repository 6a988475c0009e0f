"""Drafting on Model Runner V2: after each step, from its verified rows to the next trees, all on the device.

The drafter's keys and values of all verified positions are stored in every step: V2 hands a block to the prefix cache
as soon as it is full, and another request may read it in the next step.

Letters: R requests, M rows of a step, N node budget, S request slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_ctc_spec.engine.drafting import CTCProposer, VerifiedRows
from vllm_ctc_spec.engine.graphs import DraftInputs
from vllm_ctc_spec.engine.tensor_parallel import of_first_rank
from vllm_ctc_spec.engine.v2.device_trees import DeviceTrees, most_blocks
from vllm_ctc_spec.engine.v2.host_budget import HostBudget


class CTCSpeculator(BaseSpeculator):
    draft_logits: None = None
    supports_mm_inputs = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.drafter = CTCProposer(vllm_config)
        self.num_slots = vllm_config.scheduler_config.max_num_seqs
        self.device = device
        self.chain_only = np.zeros(self.num_slots, dtype=bool)
        """[S] requests with structured output: the grammar's mask is made for a chain."""
        self.adapts = self.drafter.settings.options.adapts
        """Whether the node budget is adaptive."""
        self.budget: HostBudget | None = None
        """On the first rank, which decides for all, if it is."""

    def load_model(self, target: Any) -> None:
        self.drafter.load_model(target)
        num_frames = self.drafter.drafter.config.num_frames
        self.trees = DeviceTrees(self.num_slots, self.drafter.settings.num_nodes, num_frames, self.device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing: `CTCProposer.capture` records drafting, after the caches are there."""

    def capture(self) -> None:
        """Nothing, see `init_cudagraph_manager`."""

    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, Tensor],
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        *args: Any,
        dummy_run: bool = False,
        is_profile: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """[R, N] int64, the tokens of each request's next tree; their structure goes to `self.trees`.

        last_sampled: [S, 1]. See `BaseSpeculator.propose` for the rest.
        """
        nothing = torch.zeros(input_batch.num_reqs, self.trees.num_nodes, dtype=torch.int64, device=self.device)
        if dummy_run:
            if is_profile:
                # vLLM measures the memory of a step. There is no cache yet.
                self.drafter.profile(input_batch.num_reqs)
            return nothing
        group = self.drafter.kv_group
        slots = self.block_tables.slot_mappings[group, : input_batch.num_tokens]
        states = [last_hidden_states, *(aux_hidden_states or ())]
        verified, last_rows, last_tokens = self._verified(input_batch, states, slots)
        self.drafter.store(verified)
        plan = None
        if self.adapts:
            plan = of_first_rank(None if self.budget is None else self.budget.plan(input_batch))
            if plan is None:
                if self.budget is not None:
                    self.budget.end_step(input_batch, self.trees.step, None, None)
                return nothing
        request_slots = input_batch.idx_mapping.long()
        lens = input_batch.seq_lens[: input_batch.num_reqs].long() - num_rejected
        num_blocks = most_blocks(input_batch, self.block_tables.block_sizes[group])
        table = self.block_tables.input_block_tables[group][: input_batch.num_reqs, :num_blocks]
        inputs = DraftInputs(
            torch.stack((last_tokens, last_sampled[request_slots, 0]), dim=1),
            verified.hidden[last_rows],
            self.drafter.attention.context(table, torch.arange(len(lens), device=self.device), lens),
        )
        packed = self.drafter.draft(inputs, self.chain_only[input_batch.idx_mapping_np].tolist())
        packed = get_tp_group().broadcast(packed)
        if self.budget is not None:
            self.budget.end_step(input_batch, self.trees.step, plan, packed)
        return self.trees.store(request_slots, packed)

    def _verified(self, batch: Any, hidden_states: list[Tensor], slots: Tensor) -> tuple[VerifiedRows, Tensor, Tensor]:
        """Rows of the step that may be verified, those that are not without a slot; and of each request the row of its
        last verified position among them, and that position's token.
        """
        total, step = batch.num_tokens, self.trees.step
        tokens = batch.input_ids[:total].long()
        fuse = self.drafter.drafter.fuse
        hidden = torch.cat([states[:total] for states in hidden_states], dim=-1)
        if step is None:
            last = batch.query_start_loc[1 : batch.num_reqs + 1].long() - 1
            return VerifiedRows(fuse(hidden), batch.positions[:total], slots), last, tokens[last]
        source = step.source_rows()[step.kept]
        verified = VerifiedRows(fuse(hidden[source]), step.positions[step.kept], step.verified_slots(slots)[step.kept])
        last = step.kept_anchors + step.accepted.num_accepted
        return verified, last, tokens[source[last]]
