"""The best token tree of a CTC drafter: the N prefixes with the largest prefix probability psi.

Both families of emissions are read as one process. The state of a prefix h = y_1 .. y_j is the row

    arrive_t(h) = P(the last token of h is emitted, and h thereby completed, exactly at frame t),

so psi(h) = sum_t arrive_t(h), and one more token c costs one product with a T x T matrix:

    arrive_t(h.c) = p_t(c | h) * before_t(h),    before_t(h) = sum_{s < t} arrive_s(h) * wait_{s,t}(h)

where wait_{s,t}(h) = P(nothing is added in frames s+1 .. t-1 after h was completed at s). In the conditioned family
that is a run of blanks. In the independent one it is a run of the last token u, then a run of blanks (Graves et al.
2006, section 3.2, whose gamma_n + gamma_b at t-1 it sums to); if c repeats u, at least one blank must lie between.
The sums over s are the forward variables of the paper, unrolled.

An emission is a product of what the frame says, what the prefix says and a normaliser of the two,

    p_t(c | h) = frame_t(c) * lift_h(c) / total_t(h),

so that psi of all children of all prefixes of a level is one product over the frames, before they exist. Where no
frame is blank, that product has one term.

psi never grows along a path, so the N largest form a connected tree, and it is the N-node tree with the largest
expected accepted length. Each level therefore keeps its best N, less what must stand above them, and the best N of all
levels are the tree.

The work is done on float32 probabilities, not logarithms: it only adds and multiplies non-negative numbers, so
nothing cancels and the relative error stays within a few T ulps; what underflows (below 1e-38) could not
contribute to an expected length anyway and counts as impossible. So does, where there is a blank, a token for which
frame and prefix disagree by more than 87 nats. Logarithms return at the boundary.

Letters: R requests, T frames, N nodes, C candidates, M prefixes kept at a level, r rank of the conditioning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .emissions import ConditionedEmissions, IndependentEmissions
from .token_tree import TokenTrees, check_num_nodes

_TINY = torch.finfo(torch.float32).tiny


def build_prefix_trees(
    emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int, min_prefix_probability: float = 0.0
) -> TokenTrees:
    """The trees of the `num_nodes` candidate prefixes with the largest psi, in descending psi.

    Prefixes of probability zero or below `min_prefix_probability` become padding. Fixed shapes, no host sync.
    """
    return _build(emissions, num_nodes, num_nodes, min_prefix_probability)


def build_chains(emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int) -> TokenTrees:
    """The greedy path: from each prefix on to the child with the largest psi, at most min(T, num_nodes) long.

    Columns beyond T are padding, as are prefixes of probability zero.
    """
    return _build(emissions, num_nodes, 1, 0.0)


@dataclass(frozen=True)
class _Level:
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
class _Children:
    """Of all M prefixes of a level."""

    parents_psi: Tensor
    """[R, M]"""
    parents_states: Tensor
    """[R, M, r]"""
    psi: Tensor
    """[R, M, C]"""
    arrive: Callable[[_Chosen], Tensor]
    """The rows of some of them: [R, M', T] or [R, M', 1]."""


@dataclass(frozen=True)
class _Chosen:
    """Some children of a level."""

    request: Tensor
    """[R, 1] 0 .. R - 1"""
    row: Tensor
    """[R, M'] their parents in the level."""
    column: Tensor
    """[R, M'] their candidates."""
    psi: Tensor
    """[R, M']"""


class _Process(Protocol):
    """What the level loop needs of emissions."""

    def first(self) -> _Children:
        """Of the empty prefix."""

    def children(self, level: _Level, depth: int) -> _Children:
        """Of a level of prefixes of `depth` tokens."""

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[R, M, r]"""


class _Independent:
    def __init__(self, emissions: IndependentEmissions) -> None:
        self._frames = emissions.token_logp.exp()
        token_runs = _runs(self._frames.mT)
        self._blank = emissions.blank_logp.exp()
        blank_runs = _runs(self._blank)[:, None]
        self._wait = _before(token_runs @ blank_runs)
        self._wait_repeat = _before(token_runs @ blank_runs.triu(1))

    def first(self) -> _Children:
        before = _all_blank(self._blank)[:, None]

        def arrive(chosen: _Chosen) -> Tensor:
            return before * self._frames.mT[chosen.request, chosen.column]

        return _Children(torch.ones_like(before[..., 0]), before[..., :0], before @ self._frames, arrive)

    def children(self, level: _Level, depth: int) -> _Children:
        last = _request_rows(level.candidates), level.candidates
        arrived = level.arrive[:, :, None]
        before, before_repeat = ((arrived @ wait[last])[:, :, 0] for wait in (self._wait, self._wait_repeat))
        repeated = (before_repeat * self._frames.mT[last]).sum(-1, keepdim=True)

        def arrive(chosen: _Chosen) -> Tensor:
            parent = chosen.request, chosen.row
            repeats = (level.candidates[parent] == chosen.column)[..., None]
            return before_repeat[parent].where(repeats, before[parent]) * self._frames.mT[chosen.request, chosen.column]

        psi = (before @ self._frames).scatter_(2, level.candidates[..., None], repeated)
        return _Children(level.psi, level.states, psi, arrive)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return states


class _Conditioned:
    """With blanks, so that a prefix may arrive at any frame."""

    def __init__(self, emissions: ConditionedEmissions, blank_logp: Tensor) -> None:
        self._emissions = emissions
        self._frames = emissions.token_logp.exp()
        self._labels = torch.cat((self._frames, blank_logp.exp()[..., None]), dim=-1)
        self._following = emissions.following().mT

    def _given(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lift [R, M, C] and total [R, M, T], each relative to the largest bias, and p_t(blank | h) [R, M, T]."""
        bias = states.bmm(self._following).float()
        peak = bias.amax(-1, keepdim=True).clamp_(min=0.0)
        lift = bias.sub_(peak).exp_()
        total = lift @ self._labels.mT
        total = total.addcmul_((-peak).exp_(), self._emissions.outside[:, None]).clamp_(min=_TINY)
        return lift[..., :-1], total, lift[..., -1:] * self._labels[:, None, :, -1] / total

    def _children(self, psi: Tensor, states: Tensor, weight: Tensor, lift: Tensor) -> _Children:
        """Of prefixes with psi [R, M]; weight: [R, M, T] before_t(h) / total_t(h)."""

        def arrive(chosen: _Chosen) -> Tensor:
            own_lift = lift[chosen.request, chosen.row, chosen.column][..., None]
            return weight[chosen.request, chosen.row] * self._frames.mT[chosen.request, chosen.column] * own_lift

        return _Children(psi, states, (weight @ self._frames).mul_(lift), arrive)

    def first(self) -> _Children:
        start = self._emissions.start[:, None]
        lift, total, blank = self._given(start)
        weight = _all_blank(blank) / total
        return self._children(torch.ones_like(weight[..., 0]), start, weight, lift)

    def children(self, level: _Level, depth: int) -> _Children:
        lift, total, blank = self._given(level.states)
        before = (level.arrive[:, :, None] @ _before(_runs(blank)))[:, :, 0]
        return self._children(level.psi, level.states, before / total, lift)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self._emissions.conditioning.advance(states, tokens)


class _Aligned:
    """Conditioned without blank: token j stands at frame j, and psi(h.c) = psi(h) p_j(c | h)."""

    def __init__(self, emissions: ConditionedEmissions) -> None:
        self._conditioning = emissions.conditioning
        self._start = emissions.start[:, None]
        self._frames = torch.cat((emissions.token_logp, emissions.outside.log()[..., None]), dim=-1)[:, :, None]
        # What is no candidate has no bias.
        self._following = F.pad(emissions.following(), (0, 0, 0, 1)).mT

    def _children(self, psi: Tensor, states: Tensor, depth: int) -> _Children:
        bias = states.bmm(self._following).float()
        probability = bias.add_(self._frames[:, depth]).softmax(-1)[..., :-1]
        return _Children(psi, states, probability * psi[..., None], lambda chosen: chosen.psi[..., None])

    def first(self) -> _Children:
        return self._children(torch.ones_like(self._frames[:, 0, :, 0]), self._start, 0)

    def children(self, level: _Level, depth: int) -> _Children:
        return self._children(level.psi, level.states, depth)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self._conditioning.advance(states, tokens)


def _process(emissions: IndependentEmissions | ConditionedEmissions) -> _Process:
    if isinstance(emissions, IndependentEmissions):
        return _Independent(emissions)
    if emissions.blank_logp is None:
        return _Aligned(emissions)
    return _Conditioned(emissions, emissions.blank_logp)


def _build(
    emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int, width: int, min_psi: float
) -> TokenTrees:
    check_num_nodes(num_nodes)
    process, tokens = _process(emissions), emissions.tokens
    request = _request_rows(tokens)
    levels = [_keep(process, process.first(), request, tokens, width)]
    for depth in range(1, min(emissions.token_logp.shape[1], num_nodes)):
        # Above each of them in the tree stand `depth` others.
        levels.append(
            _keep(process, process.children(levels[-1], depth), request, tokens, min(width, num_nodes - depth))
        )
    return _assemble(levels, tokens, num_nodes, min_psi)


def _all_blank(blank: Tensor) -> Tensor:
    """[..., T] from [..., T]: the probability that all frames before each are blank."""
    return F.pad(blank.cumprod(-1)[..., :-1], (1, 0), value=1.0)


def _runs(label: Tensor) -> Tensor:
    """[..., T, T] from [..., T]: the product of frames s+1 .. t of `label`, 1 where s = t, 0 where s > t."""
    frame = torch.arange(label.shape[-1], device=label.device)
    return torch.where(frame > frame[:, None], label[..., None, :], 1.0).cumprod(-1).triu()


def _before(at: Tensor) -> Tensor:
    """The values [..., s, t] of the frame before each frame t, zero for the first."""
    return F.pad(at[..., :-1], (1, 0))


def _keep(process: _Process, children: _Children, request: Tensor, tokens: Tensor, width: int) -> _Level:
    """The `width` children with the largest psi; request: [R, 1] 0 .. R - 1."""
    # Rounding must not lift a child above its parent, or the order would not be that of a tree.
    psi = children.psi.minimum(children.parents_psi[..., None]).flatten(1)
    best = psi.topk(min(width, psi.shape[1]), dim=1)
    num_candidates = tokens.shape[1]
    row, column = best.indices // num_candidates, best.indices % num_candidates
    states = process.advance(children.parents_states[request, row], tokens[request, column])
    return _Level(children.arrive(_Chosen(request, row, column, best.values)), column, row, best.values, states)


def _assemble(levels: list[_Level], tokens: Tensor, num_nodes: int, min_psi: float) -> TokenTrees:
    """The best `num_nodes` of all levels, numbered in descending psi; on a tie the shallower node comes first."""
    num_requests, device = tokens.shape[0], tokens.device
    anchor = tokens.new_zeros(num_requests, 1)
    offsets = [0, 1]
    for level in levels:
        offsets.append(offsets[-1] + level.psi.shape[1])
    parents = torch.cat([anchor] + [level.parents + offset for level, offset in zip(levels, offsets)], dim=1)
    candidates = torch.cat([level.candidates for level in levels], dim=1)
    node_tokens = torch.cat([anchor, tokens.gather(1, candidates)], dim=1)
    depths = torch.cat([torch.full((level.psi.shape[1],), d, device=device) for d, level in enumerate(levels, start=1)])
    depths = F.pad(depths, (1, 0)).expand(num_requests, -1)
    # The anchor is given more than any prefix can have, so that it sorts to node 0.
    psi = F.pad(torch.cat([level.psi for level in levels], dim=1), (1, 0), value=2.0)

    psi, order = psi.sort(dim=1, descending=True, stable=True)
    node_of = torch.empty_like(order).scatter_(1, order, torch.arange(offsets[-1], device=device).expand_as(order))
    psi, order = psi[:, 1 : num_nodes + 1], order[:, 1 : num_nodes + 1]
    real = (psi > 0) & (psi >= min_psi)

    def column(values: Tensor) -> Tensor:
        chosen = values.gather(1, order).where(real, 0)
        return F.pad(chosen, (0, num_nodes - order.shape[1]))

    return TokenTrees(
        tokens=column(node_tokens),
        parents=column(node_of.gather(1, parents)),
        depths=column(depths),
        prefix_logp=F.pad(psi.where(real, 0).log(), (0, num_nodes - order.shape[1]), value=-torch.inf),
        num_nodes=real.sum(1),
    )


def _request_rows(index: Tensor) -> Tensor:
    """[R, 1] to address rows of a batched table together with index [R, M]."""
    return torch.arange(index.shape[0], device=index.device)[:, None]
