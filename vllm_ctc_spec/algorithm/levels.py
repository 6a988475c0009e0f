"""Records that the tree builder and the families of emissions exchange, one level of prefixes at a time.

Letters: R requests, T frames, C candidates, M prefixes kept at a level, r rank of the conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """The prefixes kept at one depth, in descending psi."""

    arrive: Tensor
    """[R, M, T], probability that the prefix is complete at frame t (blank_families.py); [R, M, 1] without a blank."""
    candidates: Tensor
    """[R, M], index of the last token among the candidates."""
    parents: Tensor
    """[R, M], index of the parent among the prefixes kept at the depth above."""
    psi: Tensor
    """[R, M]"""
    states: Tensor
    """[R, M, r], states of conditioned emissions; r = 0 for independent ones."""


@dataclass(frozen=True)
class Children:
    """All children of the M prefixes of a level."""

    parents_psi: Tensor
    """[R, M]"""
    parents_states: Tensor
    """[R, M, r]"""
    psi: Tensor
    """[R, M, C]"""
    arrive: Callable[[Chosen], Tensor]
    """Computes `Level.arrive` of chosen children, [R, M', T] or [R, M', 1]."""


@dataclass(frozen=True)
class Chosen:
    """The M' children of a level that are kept."""

    request: Tensor
    """[R, 1], 0 .. R - 1"""
    row: Tensor
    """[R, M'], index of the parent in the level."""
    column: Tensor
    """[R, M'], index of the candidate."""
    psi: Tensor
    """[R, M']"""


class Process(Protocol):
    """A family of emissions, as the tree builder uses it."""

    def first(self) -> Children:
        """The children of the empty prefix."""

    def children(self, level: Level, depth: int) -> Children:
        """The children of a level, whose prefixes have `depth` tokens."""

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[R, M, r], the states after appending `tokens` [R, M] to prefixes with `states` [R, M, r]."""


def request_rows(index: Tensor) -> Tensor:
    """[R, 1], 0 .. R - 1, to index a batched table together with `index` [R, M]."""
    return torch.arange(index.shape[0], device=index.device)[:, None]
