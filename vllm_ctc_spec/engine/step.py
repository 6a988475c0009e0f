"""One step's requests and their trees, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from vllm_ctc_spec.engine.adaptive.control import EndedStep
from vllm_ctc_spec.engine.attention.interface import StepTrees
from vllm_ctc_spec.engine.host_tree import HostTree


class LastRows(NamedTuple):
    """Of some requests, where their last verified positions are."""

    rows: list[int]
    """Among the rows of the step."""
    among_verified: list[int]
    """Among the `verified_rows` of all requests, one after another."""
    lens: list[int]
    """Verified positions of each request after the step."""


@dataclass
class Step:
    """The requests of one step, in batch order."""

    trees: list[HostTree]
    starts: list[int]
    """First row of each request."""
    num_rows: list[int]
    num_computed: list[int]
    """Verified positions before this step: the position of each request's first row."""
    accepted_nodes: list[list[int]]
    """Per request, the node indices of its accepted path; empty until the walk."""

    @cached_property
    def total_rows(self) -> int:
        return sum(self.num_rows)

    @cached_property
    def num_nodes(self) -> int:
        """Of all trees."""
        return sum(len(tree.tokens) for tree in self.trees)

    @property
    def is_decode(self) -> bool:
        """Whether no request has prompt tokens in this step."""
        return self.total_rows == len(self.trees) + self.num_nodes

    @cached_property
    def verified_rows(self) -> list[Sequence[int]]:
        """Of each request, the rows whose tokens are verified after the walk, by position."""
        return [
            [start, *(start + node for node in nodes)] if tree.tokens else range(start, start + num_rows)
            for tree, start, num_rows, nodes in zip(
                self.trees, self.starts, self.num_rows, self.accepted_nodes, strict=True
            )
        ]

    def verified_indices(self) -> list[list[int]]:
        """Of all `verified_rows`: the row, the row whose slot is right for its position, and the position."""
        rows: list[int] = []
        slot_rows: list[int] = []
        positions: list[int] = []
        for verified, start, computed in zip(self.verified_rows, self.starts, self.num_computed):
            rows.extend(verified)
            slot_rows.extend(range(start, start + len(verified)))
            positions.extend(range(computed, computed + len(verified)))
        return [rows, slot_rows, positions]

    def last_rows(self, requests: Sequence[int]) -> LastRows:
        ends = list(accumulate(map(len, self.verified_rows)))
        return LastRows(
            [self.verified_rows[index][-1] for index in requests],
            [ends[index] - 1 for index in requests],
            [self.num_computed[index] + len(self.verified_rows[index]) for index in requests],
        )

    def tree_positions(self) -> tuple[list[int], list[int]]:
        """Rows of branching trees' nodes, and their positions: one after their parent's."""
        rows: list[int] = []
        positions: list[int] = []
        for tree, start, computed in zip(self.trees, self.starts, self.num_computed):
            if not tree.is_chain:
                rows.extend(range(start + 1, start + 1 + len(tree.depths)))
                positions.extend(computed + depth for depth in tree.depths)
        return rows, positions

    def branching_trees(self) -> StepTrees | None:
        """None where all trees are chains. In steps without prompts plain decode rows are included, so that one kernel
        reads all contexts.
        """
        if not self.num_nodes:
            return None
        requests = [index for index, tree in enumerate(self.trees) if not tree.is_chain]
        if not requests:
            return None
        if self.is_decode:
            requests = list(range(len(self.trees)))
        return StepTrees(
            requests,
            [self.starts[index] for index in requests],
            [self.num_computed[index] for index in requests],
            [self.trees[index].ancestor_masks() for index in requests],
            self.total_rows,
        )

    def ended(self, request_ids: Sequence[str], drafted: bool) -> EndedStep:
        """drafted: whether it has drafted for the next one."""
        num_accepted, expected = 0, 0.0
        if self.num_nodes:
            num_accepted = sum(map(len, self.accepted_nodes))
            expected = sum(sum(tree.probabilities) for tree in self.trees)
        return EndedStep(request_ids, drafted, self.num_nodes, num_accepted, expected, self.is_decode)

    def moves(self) -> tuple[list[list[int]], list[list[int]]]:
        """For each request, accepted rows whose keys and values must move, and the rows whose slots they move to.

        Verification wrote node i to slot i after the anchor's; the next step expects it in the slot of its depth.
        """
        sources, targets = [], []
        for start, nodes in zip(self.starts, self.accepted_nodes):
            moved = [(start + node, start + depth) for depth, node in enumerate(nodes, 1) if node != depth]
            sources.append([source for source, _ in moved])
            targets.append([target for _, target in moved])
        return sources, targets
