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

so that psi of all children of all prefixes of a level is one product over the frames, before they exist.

psi never grows along a path, so the N largest form a connected tree, and it is the N-node tree with the largest
expected accepted length. Each level therefore keeps its best N, and the best N of all
levels are the tree.

The work is done on float32 probabilities, not logarithms: it only adds and multiplies non-negative numbers, so
nothing cancels and the relative error stays within a few T ulps; what underflows (below 1e-38) could not
contribute to an expected length anyway and counts as impossible. So does a token for which frame and prefix disagree
by more than 87 nats. Logarithms return at the boundary.

Letters: R requests, T frames, N nodes, C candidates, M prefixes kept at a level, r rank of the conditioning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .emissions import ConditionedEmissions, IndependentEmissions
from .token_tree import TokenTrees

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
    """[R, M, T]"""
    candidates: Tensor
    """[R, M] index of the last token among the candidates."""
    parents: Tensor
    """[R, M] index among the prefixes kept at the depth above."""
    psi: Tensor
    """[R, M]"""
    states: Tensor
    """[R, M, r], where emissions are conditioned, else r = 0."""


@dataclass(frozen=True)
class _Chances:
    """What the children of M prefixes are made of."""

    weight: Tensor
    """[R, M, T] before_t(h) / total_t(h)"""
    lift: Tensor | None
    """[R, M, C], None if it is 1."""
    repeat_weight: Tensor | None
    """[R, M, T] the weight for c = u where repeats merge, else None."""


class _Process(Protocol):
    """What the level loop needs of either family, as probabilities."""

    frames: Tensor
    """[R, T, C] frame_t(c)"""

    def root(self) -> tuple[_Chances, Tensor]:
        """Of the empty prefix, and its state [R, 1, r]."""

    def chances(self, level: _Level) -> _Chances: ...

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """[R, M, r]"""


class _Independent:
    def __init__(self, emissions: IndependentEmissions) -> None:
        self.frames = emissions.token_logp.exp()
        token_runs = _runs(self.frames.mT)
        self._blank = emissions.blank_logp.exp()
        blank_runs = _runs(self._blank)[:, None]
        self._wait = _before(token_runs @ blank_runs)
        self._wait_repeat = _before(token_runs @ blank_runs.triu(1))

    def root(self) -> tuple[_Chances, Tensor]:
        before = _all_blank(self._blank[:, None])
        return _Chances(before, None, None), before[..., :0]

    def chances(self, level: _Level) -> _Chances:
        last = _request_rows(level.candidates), level.candidates
        arrive = level.arrive[:, :, None]
        return _Chances((arrive @ self._wait[last])[:, :, 0], None, (arrive @ self._wait_repeat[last])[:, :, 0])

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return states


class _Conditioned:
    def __init__(self, emissions: ConditionedEmissions) -> None:
        self._emissions = emissions
        self.frames = emissions.token_logp.exp()
        self._labels = torch.cat((self.frames, emissions.blank_logp.exp()[..., None]), dim=-1)

    def _given(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lift [R, M, C] and total [R, M, T], each relative to the largest bias, and p_t(blank | h) [R, M, T]."""
        bias = (states @ self._emissions.following.mT).float()
        peak = bias.amax(-1, keepdim=True).clamp_(min=0.0)
        lift = bias.sub_(peak).exp_()
        total = lift @ self._labels.mT
        total = total.addcmul_((-peak).exp_(), self._emissions.outside[:, None]).clamp_(min=_TINY)
        return lift[..., :-1], total, lift[..., -1:] * self._labels[:, None, :, -1] / total

    def root(self) -> tuple[_Chances, Tensor]:
        start = self._emissions.start[:, None]
        lift, total, blank = self._given(start)
        return _Chances(_all_blank(blank) / total, lift, None), start

    def chances(self, level: _Level) -> _Chances:
        lift, total, blank = self._given(level.states)
        before = (level.arrive[:, :, None] @ _before(_runs(blank)))[:, :, 0]
        return _Chances(before / total, lift, None)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self._emissions.conditioning.advance(states, tokens)


def _build(
    emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int, width: int, min_psi: float
) -> TokenTrees:
    if num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes}: a token tree needs a node budget of at least 1.")
    process = _Conditioned(emissions) if isinstance(emissions, ConditionedEmissions) else _Independent(emissions)
    chances, start = process.root()
    certain = torch.ones_like(chances.weight[..., 0])
    nowhere = torch.zeros_like(certain, dtype=torch.int64)
    # Nobody asks when the empty prefix arrived: its chances are known.
    root = _Level(chances.weight, nowhere, nowhere, certain, start)
    levels = [_keep(process, chances, root, emissions.tokens, width)]
    for _ in range(min(process.frames.shape[1], num_nodes) - 1):
        levels.append(_keep(process, process.chances(levels[-1]), levels[-1], emissions.tokens, width))
    return _assemble(levels, emissions.tokens, num_nodes, min_psi)


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


def _keep(process: _Process, chances: _Chances, parents: _Level, tokens: Tensor, width: int) -> _Level:
    """The `width` children of all parents with the largest psi."""
    frames, weight = process.frames, chances.weight
    psi = weight @ frames
    if chances.lift is not None:
        psi = psi.mul_(chances.lift)
    if chances.repeat_weight is not None:
        last = parents.candidates
        repeated = (chances.repeat_weight * frames.mT[_request_rows(last), last]).sum(-1, keepdim=True)
        psi = psi.scatter_(2, last[..., None], repeated)
    # Rounding must not lift a child above its parent, or the order would not be that of a tree.
    psi = psi.minimum(parents.psi[..., None]).flatten(1)
    num_candidates = tokens.shape[1]
    best = psi.topk(min(width, psi.shape[1]), dim=1)
    row, column = best.indices // num_candidates, best.indices % num_candidates
    request = _request_rows(row)
    own_weight = weight[request, row]
    if chances.repeat_weight is not None:
        repeats = (parents.candidates[request, row] == column)[..., None]
        own_weight = chances.repeat_weight[request, row].where(repeats, own_weight)
    arrive = own_weight * frames.mT[request, column]
    if chances.lift is not None:
        arrive = arrive * chances.lift[request, row, column][..., None]
    states = process.advance(parents.states[request, row], tokens[request, column])
    return _Level(arrive, column, row, best.values, states)


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
