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
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.algorithm import (
    ConditionedEmissions,
    ConditionedPrefix,
    Conditioning,
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

    @property
    def num_tokens(self) -> int:
        return self.logits.shape[1] - 1

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
    """[T, V + 1], or without blank [T, V]"""
    conditioning: Conditioning
    start: Tensor
    """[r]"""
    gate: Tensor
    """[r]"""

    @property
    def num_tokens(self) -> int:
        return len(self.conditioning.state_in)

    def _given(self, prefix: Prefix) -> list[list[float]]:
        """[T][V + 1] or [T][V] p_t(k | prefix)"""
        state = self.start.double()
        for token in prefix:
            state = self.conditioning.state_in[token].double() + self.conditioning.transition.double() @ state
        bias = self.conditioning.logit_out.double() @ (self.gate.double() * state)
        return (self.logits.double() + bias).softmax(-1).tolist()

    def outcomes(self) -> dict[Prefix, float]:
        """P(output), over all alignments: one label per frame, blanks dropped, nothing merged."""
        num_frames, num_tokens = len(self.logits), self.num_tokens
        total: dict[Prefix, float] = defaultdict(float)
        alignments: list[tuple[Prefix, float]] = [((), 1.0)]
        for frame in range(num_frames):
            longer = []
            for prefix, chance in alignments:
                labels = self._given(prefix)[frame]
                longer += [((*prefix, token), chance * labels[token]) for token in range(num_tokens)]
                longer += [(prefix, chance * blank) for blank in labels[num_tokens:]]
            alignments = longer
        for prefix, chance in alignments:
            total[prefix] += chance
        return total

    def root(self) -> ConditionedPrefix:
        last, carry, following = (
            table.double()
            for table in (self.conditioning.state_in, self.conditioning.transition, self.conditioning.logit_out)
        )
        logits, following = self.logits.double(), following * self.gate.double()
        if len(following) == len(last):
            logits, following = F.pad(logits, (0, 1), value=-math.inf), F.pad(following, (0, 0, 0, 1))
        return ConditionedPrefix.root(logits, Conditioning(last, carry, following), self.start.double())

    def emissions(self) -> ConditionedEmissions:
        return conditioned_emissions(
            self.logits[None], self.start[None], self.gate[None], self.conditioning, self.logits.shape[1]
        )


Case = IndependentCase | ConditionedCase


def prefix_probabilities(outcomes: dict[Prefix, float]) -> dict[Prefix, float]:
    """psi of every prefix of at least one token that is possible at all."""
    psi: dict[Prefix, float] = defaultdict(float)
    for output, chance in outcomes.items():
        for length in range(1, len(output) + 1):
            psi[output[:length]] += chance
    return {prefix: value for prefix, value in psi.items() if value > 0}


def best_connected_sum(psi: dict[Prefix, float], num_nodes: int) -> float:
    """The largest sum of psi of any connected tree of at most `num_nodes` nodes, by enumeration."""
    trees = {frozenset[Prefix]()}
    for _ in range(min(num_nodes, len(psi))):
        trees = {
            tree | {prefix}
            for tree in trees
            for prefix in psi
            if prefix not in tree and (len(prefix) == 1 or prefix[:-1] in tree)
        }
    return max(sum(psi[prefix] for prefix in tree) for tree in trees)


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
_CARRIES = st.sampled_from([-0.5, 0.0, 0.5])


def _matrix(values: st.SearchStrategy[float], rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    return st.lists(values, min_size=rows * columns, max_size=rows * columns).map(
        lambda flat: torch.tensor(flat).reshape(rows, columns)
    )


@st.composite
def logits(draw: st.DrawFn, num_frames: int, num_labels: int) -> Tensor:
    matrix = draw(_matrix(_LOGITS, num_frames, num_labels))
    possible = matrix.isfinite().any(-1, keepdim=True)
    return matrix.where(possible, 0.0)


def independent_cases(max_frames: int = 4, max_tokens: int = 3) -> st.SearchStrategy[IndependentCase]:
    shapes = st.tuples(st.integers(1, max_frames), st.integers(1, max_tokens))
    return shapes.flatmap(lambda shape: logits(shape[0], shape[1] + 1)).map(IndependentCase)


@st.composite
def conditioned_cases(draw: st.DrawFn, max_frames: int = 4, max_tokens: int = 3) -> ConditionedCase:
    num_frames, num_tokens = draw(st.integers(1, max_frames)), draw(st.integers(1, max_tokens))
    num_labels = max(2, num_tokens + draw(st.integers(0, 1)))
    conditioning = Conditioning(
        draw(_matrix(_WEIGHTS, num_tokens, 2)),
        draw(_matrix(_CARRIES, 2, 2)),
        draw(_matrix(_WEIGHTS, num_labels, 2)),
    )
    start, gate = draw(_matrix(_WEIGHTS, 2, 2))
    return ConditionedCase(draw(logits(num_frames, num_labels)), conditioning, start, gate)


def cases(max_frames: int = 4, max_tokens: int = 3) -> st.SearchStrategy[Case]:
    return independent_cases(max_frames, max_tokens) | conditioned_cases(max_frames, max_tokens)
