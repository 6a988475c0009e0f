"""The records that the tree builder and the families of emissions exchange, one level of prefixes at a time.

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
    """[R, M, T], or [R, M, 1] where only one frame is possible."""
    candidates: Tensor
    """[R, M] index of the last token among the candidates."""
    parents: Tensor
    """[R, M] index among the prefixes kept at the depth above."""
    psi: Tensor
    """[R, M]"""
    states: Tensor
    """[R, M, r], where emissions are conditioned, else r = 0."""


@dataclass(frozen=True)
class Children:
    """Of all M prefixes of a level."""

    parents_psi: Tensor
    """[R, M]"""
    parents_states: Tensor
    """[R, M, r]"""
    psi: Tensor
    """[R, M, C]"""
    arrive: Callable[[Chosen], Tensor]
    """The rows of some of them: [R, M', T] or [R, M', 1]."""


@dataclass(frozen=True)
class Chosen:
    """Some children of a level."""

    request: Tensor
    """[R, 1] 0 .. R - 1"""
    row: Tensor
    """[R, M'] their parents in the level."""
    column: Tensor
    """[R, M'] their candidates."""
    psi: Tensor
    """[R, M']"""


class Process(Protocol):
    """What the level loop needs of emissions."""

    def first(self) -> Children:
        """Of the empty prefix."""

    def children(self, level: Level, depth: int) -> Children:
        """Of a level of prefixes of `depth` tokens."""

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[R, M, r]"""


def request_rows(index: Tensor) -> Tensor:
    """[R, 1] to address rows of a batched table together with index [R, M]."""
    return torch.arange(index.shape[0], device=index.device)[:, None]
