"""Token trees on the host, as the runner and the scheduler handle them, and their way there from the device.

Letters: R requests, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_ctc_spec.algorithm import Prefixes, TokenTrees


@dataclass(frozen=True)
class HostTree:
    """One request's drafted tree on the host: node i in 1..N is entry i - 1."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    probabilities: list[float]
    """Prefix probability psi of each node: the estimate that the target accepts it. Of a prefix tree in
    descending order."""

    @classmethod
    def chain(cls, tokens: list[int]) -> HostTree:
        """Of tokens that the drafter did not draft, each the child of the one before; psi is not known and 0."""
        count = len(tokens)
        return cls(tokens, list(range(count)), list(range(1, count + 1)), [0.0] * count)

    @classmethod
    def of(cls, prefixes: Prefixes) -> HostTree:
        depths = [0]
        for parent in prefixes.parents:
            depths.append(depths[parent] + 1)
        return cls(list(prefixes.tokens), list(prefixes.parents), depths[1:], list(prefixes.psi))

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(len(self.parents)))

    def cut(self, num_nodes: int) -> HostTree:
        """Its first nodes."""
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


def pack(trees: TokenTrees) -> Tensor:
    """[R, 4 N + 1] int64: tokens, parents, depths, the bits of psi as float64, and the number of nodes.

    One tensor, because the host waits for the GPU at each copy.
    """
    bits = trees.prefix_logp.exp().double().view(torch.int64)
    return torch.cat((trees.tokens, trees.parents, trees.depths, bits, trees.num_nodes[:, None]), dim=1)


class PackedTrees(NamedTuple):
    """What `pack` packed, as views of it. Columns at and beyond `num_nodes` are padding, see TokenTrees."""

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    """[R, N] int64 each"""
    probabilities: Tensor
    """[R, N] float64"""
    num_nodes: Tensor
    """[R] int64"""


def fields_of(packed: Tensor) -> PackedTrees:
    """Of [R, 4 N + 1], on its device."""
    tokens, parents, depths, bits = packed[:, :-1].unflatten(1, (4, -1)).unbind(1)
    return PackedTrees(tokens, parents, depths, bits.contiguous().view(torch.float64), packed[:, -1])


def unpack(packed: Tensor) -> list[HostTree]:
    """The R trees of `pack`; waits for the device."""
    trees = fields_of(packed.cpu())
    rows = zip(*(field.tolist() for field in trees[:4]), strict=True)
    return [HostTree(*row).cut(count) for row, count in zip(rows, trees.num_nodes.tolist())]
