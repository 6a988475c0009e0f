"""The token trees of all requests on the device, and what the trees of one step mean for its rows.

vLLM keeps the drafted tokens themselves in `RequestState.draft_tokens` (vllm/v1/worker/gpu/states.py); this keeps their
structure beside them. Nothing here waits for the device: what decides about shapes is known on the host.

Letters: S request slots (`max_num_reqs`), R requests of a step, M rows of a step, K drafted rows of a step, P rows of a
step that may be verified, N node budget, D largest depth of a tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_ctc_spec.algorithm import TokenTrees
from vllm_ctc_spec.algorithm.walk import AcceptedPaths
from vllm_ctc_spec.engine.host_tree import fields_of
from vllm_ctc_spec.ops.tree_batch import TreeBatch


@dataclass
class TreeStep:
    """The drafted rows of one step. Node n of a request lies n rows below its anchor."""

    input_batch: Any
    """vLLM's `InputBatch`."""
    counts: np.ndarray
    """[R] drafted rows of each request."""
    rows: Tensor
    """[K] int64, row of the step."""
    requests: Tensor
    """[K] int64, index of its request in the batch."""
    nodes: Tensor
    """[K] int64, from 1."""
    num_nodes: Tensor
    """[R] int64, `counts` on the device."""
    anchors: Tensor
    """[R] int64, row of each request's anchor: of a prompt its last row."""
    kept: Tensor
    """[P] int64, all rows but drafted ones beyond the longest path"""
    kept_anchors: Tensor
    """[R] int64, place of each request's anchor among `kept`"""
    positions: Tensor
    """[M] int64, in the order of the cache's slots; those of vLLM's batch follow the depth."""
    paths: AcceptedPaths | None = None
    """Set by the verifier, before anything below is asked for."""

    @property
    def num_rows(self) -> int:
        """M"""
        return len(self.positions)

    @property
    def accepted(self) -> AcceptedPaths:
        assert self.paths is not None
        return self.paths

    def path_rows(self) -> Tensor:
        """[R, D] int64: rows of the accepted nodes, by depth; beyond a path's end the anchor's."""
        return self.anchors[:, None] + self.accepted.nodes.clamp(min=0)

    def source_rows(self) -> Tensor:
        """[M] int64: for each row, the row whose hidden state belongs to the row's slot after the walk."""
        source = torch.arange(self.num_rows + 1, device=self.rows.device)
        nodes = self.accepted.nodes
        depths = torch.arange(1, nodes.shape[1] + 1, device=nodes.device)
        # What is not accepted goes to a row of its own, which is cut off.
        target = (self.anchors[:, None] + depths).where(nodes > 0, self.num_rows)
        source.scatter_(0, target.flatten(), self.path_rows().flatten())
        return source[:-1]

    def verified_slots(self, slots: Tensor) -> Tensor:
        """[M] int64: `slots` [M] with -1 in rows whose position is not verified."""
        rejected = self.nodes > self.accepted.num_accepted[self.requests]
        verified = slots.clone()
        verified[self.rows] = verified[self.rows].masked_fill(rejected, -1)
        return verified

    def moves(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """[R, D] int64 each: slots whose keys and values move, and where to; -1 where nothing moves."""
        nodes = self.accepted.nodes
        depths = torch.arange(1, nodes.shape[1] + 1, device=nodes.device)
        moves = (nodes > 0) & (nodes != depths)
        last = self.num_rows - 1
        targets = (self.anchors[:, None] + depths).clamp(max=last)
        return slots[self.path_rows()].where(moves, -1), slots[targets].where(moves, -1)


def most_blocks(input_batch: Any, block_size: int) -> int:
    """That a request of vLLM's batch may have; known on the host."""
    longest = int(input_batch.seq_lens_cpu_upper_bound[: input_batch.num_reqs].max())
    return -(-longest // block_size)


class DeviceTrees:
    def __init__(self, num_slots: int, num_nodes: int, max_depth: int, device: torch.device) -> None:
        self.num_nodes = num_nodes
        self.max_depth = max_depth
        chain = torch.arange(num_nodes, device=device).expand(num_slots, -1)
        # A request that vLLM pads with drafts before it has any is verified as a chain.
        self.parents = chain.clone()
        """[S, N] int64"""
        self.depths = chain + 1
        """[S, N] int64, at least 1: padding is a child of the anchor."""
        self.sizes = torch.full((num_slots,), num_nodes, dtype=torch.int64, device=device)
        """[S] nodes that are no padding."""
        self.masks = self._trees(self.depths, self.parents, self.depths, self.sizes).ancestor_masks()
        """[S, N + 1] int64, see `TokenTrees.ancestor_masks`."""
        self.step: TreeStep | None = None
        """Of the step that is being run, if it has drafts."""

    @staticmethod
    def _trees(tokens: Tensor, parents: Tensor, depths: Tensor, sizes: Tensor) -> TokenTrees:
        return TokenTrees(tokens, parents, depths, torch.zeros_like(tokens, dtype=torch.float32), sizes)

    def store(self, slots: Tensor, packed: Tensor) -> Tensor:
        """Keep the structure of trees [R, 4 N + 1] of `host_tree.pack` for request slots [R]; returns tokens [R, N]."""
        trees = fields_of(packed)
        depths = trees.depths.clamp(min=1)
        self.parents[slots], self.depths[slots], self.sizes[slots] = trees.parents, depths, trees.num_nodes
        self.masks[slots] = self._trees(trees.tokens, trees.parents, depths, trees.num_nodes).ancestor_masks()
        return trees.tokens

    def begin(self, input_batch: Any) -> None:
        """Takes up the drafts of vLLM's batch and sets their rotary positions, which follow the depth.

        Slots of the cache must have been assigned before: they follow the rows.
        """
        self.step = None
        if not input_batch.num_draft_tokens:
            return
        counts = input_batch.num_draft_tokens_per_req
        ends = input_batch.query_start_loc_np[1 : len(counts) + 1]
        anchors = ends - counts - 1
        requests = np.repeat(np.arange(len(counts)), counts)
        nodes = np.arange(len(requests)) - np.repeat(counts.cumsum() - counts, counts) + 1
        device = self.parents.device
        packed = async_tensor_h2d(np.stack((anchors[requests] + nodes, requests, nodes)), device=device)
        rows, at_request, at_node = packed.long()
        is_kept = np.ones(input_batch.num_tokens, dtype=bool)
        is_kept[(anchors[requests] + nodes)[nodes > self.max_depth]] = False
        kept = async_tensor_h2d(is_kept.nonzero()[0], device=device)
        of_requests = np.stack((anchors, counts, is_kept.cumsum()[anchors] - 1))
        at_anchor, num_nodes, kept_anchors = async_tensor_h2d(of_requests, device=device).long()
        positions = input_batch.positions[: input_batch.num_tokens]
        sequential = positions.clone()
        slot = input_batch.idx_mapping[at_request].long()
        positions[rows] = sequential[at_anchor[at_request]] + self.depths[slot, at_node - 1]
        self.step = TreeStep(
            input_batch, counts, rows, at_request, at_node, num_nodes, at_anchor, kept, kept_anchors, sequential
        )

    def of_step(self, tokens: Tensor) -> TokenTrees:
        """The trees of the step's requests, cut to the rows that were scheduled; tokens: [R, N]."""
        assert self.step is not None
        slots = self.step.input_batch.idx_mapping.long()
        sizes = torch.minimum(self.sizes[slots], self.step.num_nodes)
        return self._trees(tokens, self.parents[slots], self.depths[slots], sizes)

    def tree_batch(self, block_table: Tensor, block_size: int) -> tuple[TreeBatch, Tensor, bool]:
        """For attention, the rows that must not go to vLLM's kernel, their requests, and whether these are all rows of
        the step.

        In steps without prompts plain decode rows are included, so that one kernel reads all contexts.
        """
        step = self.step
        assert step is not None
        batch, counts = step.input_batch, step.counts
        is_decode = batch.num_tokens == batch.num_reqs + int(counts.sum())
        chosen = np.arange(len(counts)) if is_decode else counts.nonzero()[0]
        at_request = async_tensor_h2d(chosen, device=block_table.device)
        starts, num_rows = step.anchors[at_request], step.num_nodes[at_request].int() + 1
        masks = torch.zeros(step.num_rows, dtype=torch.int64, device=block_table.device)
        masks[starts] = 1
        masks[step.rows] = self.masks[batch.idx_mapping[step.requests].long(), step.nodes]
        tree_batch = TreeBatch(
            row_starts=starts.int(),
            num_rows=num_rows,
            ancestor_masks=masks,
            context_lens=(batch.seq_lens[at_request] - num_rows).int(),
            block_table=block_table[at_request, : most_blocks(batch, block_size)],
            max_rows=int(counts.max()) + 1,
        )
        return tree_batch, at_request, is_decode
