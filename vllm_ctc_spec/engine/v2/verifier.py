"""Verification on Model Runner V2: vLLM's own sampler at every node, then the walk, all on the device.

V2's noise is a function of seed, position and token (vllm/v1/worker/gpu/sample/gumbel.py), and a node's position is its
depth's. So the sampler, asked for all rows at once, gives every node the token that plain decoding would draw there.
What sees earlier tokens of the answer (penalties, bad words, thinking budgets, processors of a user) goes level by
level: the tokens of a level are written into vLLM's request states, as plain decoding would write them, before the
next level is sampled. At the end that is taken back, because vLLM writes all tokens of a step itself.

Letters: R requests, L rows of logits, N node budget, D largest depth, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected, post_update
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_ctc_spec.algorithm.walk import AcceptedPaths, accept_greedy, child_of
from vllm_ctc_spec.engine.v2.device_trees import DeviceTrees


@dataclass(frozen=True)
class Walked:
    tokens: Tensor
    """[R, D + 1] int64, the target's tokens along the path; beyond its end anything."""
    paths: AcceptedPaths
    rows: Tensor
    """[R, D + 1] int64, row of the logits of each token."""
    processed: Tensor | None
    """[R * (D + 1), V], the logits that the tokens were drawn from, where log probabilities are of them."""


class TreeVerifier:
    """In the place of vLLM's `RejectionSampler`, called with what it is called with."""

    def __init__(self, sampler: Any, trees: DeviceTrees) -> None:
        """sampler: vLLM's, of V2."""
        self.sampler = sampler
        self.trees = trees

    def __call__(
        self, logits: Tensor, input_batch: Any, draft_logits: None = None, invalid_drafts: Tensor | None = None
    ) -> SamplerOutput:
        """logits: [L, V], the anchor's and its nodes' of each request; invalid_drafts: [L] bool, rows whose token the
        grammar forbids.
        """
        step = self.trees.step
        assert step is not None
        num_nans = get_num_nans(logits) if self.sampler.compute_nans else None
        tokens = self._drafted(input_batch, invalid_drafts)
        # Level by level the sampler has one row of each request, so that memory is no question.
        if self._sees_path(input_batch) or len(logits) > get_max_chunk_logits(logits.shape[1]):
            walked = self._walk_levels(logits, input_batch, tokens)
        else:
            walked = self._walk_at_once(logits, input_batch, tokens)
        step.paths = walked.paths
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            (walked.paths.num_accepted + 1).int(),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=walked.tokens,
            logprobs_tensors=self._logprobs(logits, input_batch, walked),
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            sampling_mask_tensors=None,
        )

    def _drafted(self, batch: Any, invalid_drafts: Tensor | None) -> Tensor:
        """[R, N] int64: the drafted tokens, -1 where there is none or none may be accepted."""
        starts, num_nodes = batch.cu_num_logits[:-1].long(), self.trees.num_nodes
        counts = batch.cu_num_logits.diff() - 1
        columns = torch.arange(num_nodes, device=starts.device)
        rows = (starts[:, None] + 1 + columns).clamp(max=len(batch.logits_indices) - 1)
        tokens = batch.input_ids[batch.logits_indices[rows]].long()
        exists = columns < counts[:, None]
        if invalid_drafts is not None:
            exists &= ~invalid_drafts[rows]
        # vLLM fills up a request's last prompt row with drafts that nobody made (vllm/v1/core/sched/scheduler.py).
        anchors = batch.positions[batch.logits_indices[starts]]
        exists &= (anchors >= self.sampler.req_states.prefill_len.gpu[batch.idx_mapping.long()])[:, None]
        return tokens.where(exists, -1)

    def _sees_path(self, batch: Any) -> bool:
        sampler, slots = self.sampler, batch.idx_mapping_np
        if not sampler.needs_logits_processing[slots].any():
            return False
        # vLLM's own are bias, penalties and bad words, in this order.
        _, penalties, bad_words, *of_user = sampler.logits_processors
        thinking = sampler.thinking_budget_state
        return bool(
            of_user
            or penalties.use_penalty[slots].any()
            or bad_words.num_bad_words.np[slots].any()
            or (thinking.enabled and thinking.use_thinking_budget[slots].any())
        )

    def _sample(self, logits: Tensor, batch: Any, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """vLLM's sampler on `logits` of rows `rows` of the batch's logits, each as a request's only one."""
        at = batch.logits_indices[rows]
        sampled: tuple[Tensor, Tensor] = self.sampler.sample(
            logits,
            slots,
            batch.idx_mapping,
            batch.idx_mapping_np,
            batch.positions[at],
            batch.input_ids[at],
            torch.zeros_like(rows, dtype=torch.int32),
            batch.seq_lens_cpu_upper_bound.numpy(),
            return_logprobs=self.sampler.get_logprobs_dims(batch.idx_mapping_np) is not None,
        )
        return sampled

    def _walk_at_once(self, logits: Tensor, batch: Any, tokens: Tensor) -> Walked:
        every = torch.arange(len(logits), device=logits.device)
        choices, processed = self._sample(logits, batch, every, batch.expanded_idx_mapping)
        starts = batch.cu_num_logits[:-1].long()
        columns = torch.arange(self.trees.num_nodes + 1, device=logits.device)
        rows = (starts[:, None] + columns).clamp(max=len(logits) - 1)
        of_nodes = choices[rows]
        paths = accept_greedy(self.trees.of_step(tokens), of_nodes, self.trees.max_depth)
        at = F.pad(paths.nodes.clamp(min=0), (1, 0))
        path_rows = rows.gather(1, at)
        kept = processed[path_rows.flatten()] if self._reads_processed(batch) else None
        return Walked(of_nodes.gather(1, at), paths, path_rows, kept)

    def _walk_levels(self, logits: Tensor, batch: Any, tokens: Tensor) -> Walked:
        states, penalties = self.sampler.req_states, self.sampler.penalties_state
        trees, slots = self.trees.of_step(tokens), batch.idx_mapping.long()
        starts, reads_processed = batch.cu_num_logits[:-1].long(), self._reads_processed(batch)
        node = torch.zeros_like(starts)
        # Of an unfinished prompt vLLM keeps no sample.
        alive = batch.seq_lens[: batch.num_reqs] >= states.prefill_len.gpu[slots]
        drawn, nodes, rows, processed, emitted = [], [], [], [], []
        for _ in range(self.trees.max_depth + 1):
            at = starts + node
            sampled, level = self._sample(logits[at], batch, at, batch.idx_mapping)
            drawn.append(sampled.long())
            rows.append(at)
            if reads_processed:
                processed.append(level)
            emitted.append(alive)
            self._write(batch, sampled, alive)
            child = child_of(trees, node, drawn[-1])
            alive = alive & (child > 0)
            node = child.where(alive, node)
            nodes.append(child.where(alive, -1))
        self._take_back(slots, torch.stack(drawn, 1), torch.stack(emitted, 1), penalties.output_bin_counts)
        path = torch.stack(nodes[:-1], 1)
        return Walked(
            torch.stack(drawn, 1),
            AcceptedPaths(path, (path > 0).sum(1)),
            torch.stack(rows, 1),
            torch.stack(processed, 1).flatten(0, 1) if processed else None,
        )

    def _reads_processed(self, batch: Any) -> bool:
        """Whether somebody asks for log probabilities of the logits that tokens are drawn from."""
        asks = self.sampler.get_logprobs_dims(batch.idx_mapping_np) is not None
        return asks and self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES

    def _write(self, batch: Any, sampled: Tensor, alive: Tensor) -> None:
        """As vLLM does after a step of plain decoding."""
        states = self.sampler.req_states
        post_update(
            batch.idx_mapping,
            states.num_computed_tokens.gpu,
            states.last_sampled_tokens,
            self.sampler.penalties_state.output_bin_counts,
            sampled.view(-1, 1),
            alive.int(),
            torch.zeros_like(alive, dtype=torch.int32),
            None,
            states.all_token_ids.gpu,
            states.total_len.gpu,
        )

    def _take_back(self, slots: Tensor, tokens: Tensor, emitted: Tensor, counts: Tensor) -> None:
        """tokens: [R, D + 1]; emitted: [R, D + 1] bool, those that were written."""
        self.sampler.req_states.total_len.gpu.index_add_(0, slots, -emitted.sum(1).int())
        counts.index_put_((slots[:, None].expand_as(tokens), tokens), -emitted.int(), accumulate=True)

    def _logprobs(self, logits: Tensor, batch: Any, walked: Walked) -> LogprobsTensors | None:
        dims = self.sampler.get_logprobs_dims(batch.idx_mapping_np)
        if dims is None:
            return None
        num_logprobs, most_tokens = dims
        num_requests, num_levels = walked.rows.shape
        mode = self.sampler.logprobs_mode
        rows = logits[walked.rows.flatten()] if walked.processed is None else walked.processed
        scores: LogprobsTensors = compute_topk_scores(
            rows,
            num_logprobs,
            walked.tokens.flatten(),
            (num_levels * np.arange(num_requests + 1)).tolist(),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.idx_mapping.repeat_interleave(num_levels),
            max_per_req_token_ids=most_tokens,
            logits_mode=mode in ("raw_logits", "processed_logits"),
        )
        return scores
