"""Oracles that enumerate every alignment, and random small cases for both families of emission.

Letters: T frames, V vocabulary without blank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.algorithm import (
    ConditionedEmissions,
    ConditionedPrefix,
    IndependentEmissions,
    IndependentPrefix,
    TokenTrees,
    conditioned_emissions,
    independent_emissions,
)

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class IndependentCase:
    logits: Tensor
    """[T, V + 1]"""

    def outcomes(self) -> dict[Prefix, float]:
        """P(collapsed output), over all alignments; repeats merged and blanks dropped label by label."""
        probability = self.logits.double().softmax(-1).tolist()
        blank = len(probability[0]) - 1
        total: dict[Prefix, float] = defaultdict(float)
        for alignment in product(range(blank + 1), repeat=len(probability)):
            output: list[int] = []
            previous = blank
            for label in alignment:
                if label not in (blank, previous):
                    output.append(label)
                previous = label
            total[tuple(output)] += math.prod(frame[label] for frame, label in zip(probability, alignment))
        return total

    def root(self) -> IndependentPrefix:
        return IndependentPrefix.root(self.logits.double().log_softmax(-1))

    def emissions(self) -> IndependentEmissions:
        return independent_emissions(self.logits[None], self.logits.shape[1])


@dataclass(frozen=True)
class ConditionedCase:
    logits: Tensor
    """[T, V + 1]"""
    condition_last: Tensor
    condition_next: Tensor
    anchor: int

    def alignments(self) -> Iterator[tuple[Prefix, float]]:
        """Every alignment and its probability: one label per frame, each given the last one that is no blank."""
        bias = self.condition_last.double() @ self.condition_next.double().T
        probability = (self.logits.double()[:, None] + bias).softmax(-1).tolist()
        blank = self.logits.shape[1] - 1
        for alignment in product(range(blank + 1), repeat=len(probability)):
            last, chance = self.anchor, 1.0
            for frame, label in zip(probability, alignment):
                chance *= frame[last][label]
                last = last if label == blank else label
            yield alignment, chance

    def outcomes(self) -> dict[Prefix, float]:
        """P(output), over all alignments: blanks dropped, nothing merged."""
        blank = self.logits.shape[1] - 1
        total: dict[Prefix, float] = defaultdict(float)
        for alignment, chance in self.alignments():
            total[tuple(label for label in alignment if label != blank)] += chance
        return total

    def root(self) -> ConditionedPrefix:
        return ConditionedPrefix.root(
            self.logits.double(), self.condition_last.double(), self.condition_next.double(), self.anchor
        )

    def emissions(self) -> ConditionedEmissions:
        anchors = torch.tensor([self.anchor])
        return conditioned_emissions(
            self.logits[None], anchors, self.condition_last, self.condition_next, self.logits.shape[1]
        )


Case = IndependentCase | ConditionedCase


def prefix_probabilities(outcomes: dict[Prefix, float]) -> dict[Prefix, float]:
    """psi of every prefix of at least one token that is possible at all."""
    psi: dict[Prefix, float] = defaultdict(float)
    for output, chance in outcomes.items():
        for length in range(1, len(output) + 1):
            psi[output[:length]] += chance
    return {prefix: value for prefix, value in psi.items() if value > 0}


def node_prefixes(trees: TokenTrees, request: int = 0) -> list[Prefix]:
    """The prefix that ends in each real node, by following parents."""
    prefixes: list[Prefix] = [()]
    for column in range(int(trees.num_nodes[request])):
        parent = int(trees.parents[request, column])
        prefixes.append((*prefixes[parent], int(trees.tokens[request, column])))
    return prefixes[1:]


def all_prefixes(num_tokens: int, max_length: int) -> Iterator[Prefix]:
    for length in range(max_length + 1):
        yield from product(range(num_tokens), repeat=length)


# Few distinct values make exact ties common; -inf makes impossible labels.
_LOGITS = st.sampled_from([-math.inf, -2.0, 0.0, 0.0, 1.0, 3.0])
_WEIGHTS = st.sampled_from([-2.0, -0.5, 0.0, 1.0])


def _matrix(values: st.SearchStrategy[float], rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    return st.lists(values, min_size=rows * columns, max_size=rows * columns).map(
        lambda flat: torch.tensor(flat).reshape(rows, columns)
    )


@st.composite
def logits(draw: st.DrawFn, num_frames: int, num_tokens: int) -> Tensor:
    matrix = draw(_matrix(_LOGITS, num_frames, num_tokens + 1))
    possible = matrix.isfinite().any(-1, keepdim=True)
    return matrix.where(possible, 0.0)


def independent_cases(max_frames: int = 4, max_tokens: int = 3) -> st.SearchStrategy[IndependentCase]:
    shapes = st.tuples(st.integers(1, max_frames), st.integers(1, max_tokens))
    return shapes.flatmap(lambda shape: logits(*shape)).map(IndependentCase)


@st.composite
def conditioned_cases(draw: st.DrawFn, max_frames: int = 4, max_tokens: int = 3) -> ConditionedCase:
    num_frames, num_tokens = draw(st.integers(1, max_frames)), draw(st.integers(1, max_tokens))
    last, following = draw(_matrix(_WEIGHTS, num_tokens, 2)), draw(_matrix(_WEIGHTS, num_tokens + 1, 2))
    return ConditionedCase(draw(logits(num_frames, num_tokens)), last, following, draw(st.integers(0, num_tokens - 1)))


def cases(max_frames: int = 4, max_tokens: int = 3) -> st.SearchStrategy[Case]:
    return independent_cases(max_frames, max_tokens) | conditioned_cases(max_frames, max_tokens)
