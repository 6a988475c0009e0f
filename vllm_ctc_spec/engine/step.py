"""One step's requests and their trees, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vllm_ctc_spec.engine.attention.interface import StepTrees
from vllm_ctc_spec.engine.sampler import HostTree


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
        """Of all trees; where there are none, all rows are certain."""
        return sum(len(tree.tokens) for tree in self.trees)

    @property
    def is_decode(self) -> bool:
        """No request has a prompt in it."""
        return self.total_rows == len(self.trees) + self.num_nodes

    @cached_property
    def verified_rows(self) -> list[Sequence[int]]:
        """Of each request, the rows that are certain after the walk, by position."""
        return [
            [start, *(start + node for node in nodes)] if tree.tokens else range(start, start + num_rows)
            for tree, start, num_rows, nodes in zip(
                self.trees, self.starts, self.num_rows, self.accepted_nodes, strict=True
            )
        ]

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
        """With what is beside them, unless there are prompts: one kernel reads each context once, two would not."""
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

    def moves(self) -> tuple[list[list[int]], list[list[int]]]:
        """For each request, rows whose keys and values verification wrote to the wrong slots, and the rows of the right
        ones: node i is in the i-th slot, its place is the slot of its depth.
        """
        sources, targets = [], []
        for start, nodes in zip(self.starts, self.accepted_nodes):
            moved = [(start + node, start + depth) for depth, node in enumerate(nodes, 1) if node != depth]
            sources.append([source for source, _ in moved])
            targets.append([target for _, target in moved])
        return sources, targets
