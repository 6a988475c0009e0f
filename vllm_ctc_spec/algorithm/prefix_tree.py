"""The best token tree of a CTC drafter: the N prefixes with the largest prefix probability psi.

Both families of emissions are read as one process. The state of a prefix h = y_1 .. y_j is the row

    arrive_t(h) = P(the last token of h is emitted, and h thereby completed, exactly at frame t),

so psi(h) = sum_t arrive_t(h), and one more token c costs one product with a T x T matrix:

    arrive_t(h.c) = p_t(c | y_j) * sum_{s < t} arrive_s(h) * wait_{s,t}(y_j)

where wait_{s,t}(u) = P(nothing is added in frames s+1 .. t-1 after u was emitted at s). In the conditioned family
that is a run of blanks. In the independent one it is a run of u, then a run of blanks (Graves et al. 2006,
section 3.2, whose gamma_n + gamma_b at t-1 it sums to); if c repeats u, at least one blank must lie between.
The sums over s are the forward variables of the paper, unrolled.

psi never grows along a path, so the N largest form a connected tree, and it is the N-node tree with the largest
expected accepted length. Each level therefore keeps its best N, and the best N of all
levels are the tree.

The work is done on float32 probabilities, not logarithms: it only adds and multiplies non-negative numbers, so
nothing cancels and the relative error stays within a few T ulps; what underflows (below 1e-38) could not
contribute to an expected length anyway and counts as impossible. Logarithms return at the boundary.

Letters: R requests, T frames, N nodes, C candidates, M prefixes kept at a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .emissions import ConditionedEmissions, IndependentEmissions
from .token_tree import TokenTrees


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
class _Process:
    """What the level loop needs of either family, as probabilities."""

    first: Tensor
    """[R, C, T] arrive of the prefixes of one token."""
    emit: Tensor
    """[R, C, C, T] p_t(c | u) with u before c, or [R, 1, C, T] where u does not matter."""
    wait: Tensor
    """[R, C, T, T] wait_{s,t}(u), zero unless s < t."""
    wait_repeat: Tensor | None
    """[R, C, T, T] the same for c = u where repeats merge, else None."""


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


def _build(
    emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int, width: int, min_psi: float
) -> TokenTrees:
    if num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes}: a token tree needs a node budget of at least 1.")
    process = _conditioned(emissions) if isinstance(emissions, ConditionedEmissions) else _independent(emissions)
    certain = torch.ones_like(process.first[:, :1, 0])
    levels = [_keep(process.first[:, None], certain, width)]
    for _ in range(min(process.first.shape[-1], num_nodes) - 1):
        levels.append(_keep(_extend(process, levels[-1]), levels[-1].psi, width))
    return _assemble(levels, emissions.tokens, num_nodes, min_psi)


def _conditioned(emissions: ConditionedEmissions) -> _Process:
    return _Process(
        first=_first(emissions.root_logp, emissions.root_blank_logp),
        emit=emissions.pair_logp.permute(0, 2, 3, 1).contiguous().exp_(),
        wait=_before(_runs(emissions.pair_blank_logp.mT.exp())),
        wait_repeat=None,
    )


def _independent(emissions: IndependentEmissions) -> _Process:
    emit = emissions.token_logp.mT.exp()
    token_runs, blank_runs = _runs(emit), _runs(emissions.blank_logp.exp())[:, None]
    return _Process(
        first=_first(emissions.token_logp, emissions.blank_logp),
        emit=emit[:, None],
        wait=_before(token_runs @ blank_runs),
        wait_repeat=_before(token_runs @ blank_runs.triu(1)),
    )


def _first(token_logp: Tensor, blank_logp: Tensor) -> Tensor:
    """[R, C, T] probability that token c [R, T, C] in frame t is the first that is no blank [R, T]."""
    all_blank = F.pad(blank_logp.exp().cumprod(-1)[:, :-1], (1, 0), value=1.0)
    return token_logp.mT.exp() * all_blank[:, None]


def _runs(label: Tensor) -> Tensor:
    """[..., T, T] from [..., T]: the product of frames s+1 .. t of `label`, 1 where s = t, 0 where s > t."""
    frame = torch.arange(label.shape[-1], device=label.device)
    return torch.where(frame > frame[:, None], label[..., None, :], 1.0).cumprod(-1).triu()


def _before(at: Tensor) -> Tensor:
    """The values [..., s, t] of the frame before each frame t, zero for the first."""
    return F.pad(at[..., :-1], (1, 0))


def _extend(process: _Process, level: _Level) -> Tensor:
    """[R, M, C, T] arrive of every child of the prefixes kept at a level."""
    last = _request_rows(level.candidates), level.candidates
    arrive = level.arrive[:, :, None]
    before = arrive @ process.wait[last]
    if process.wait_repeat is None:
        return before * process.emit[last]
    children = before * process.emit
    repeated = (arrive @ process.wait_repeat[last]) * process.emit[:, 0][last][:, :, None]
    return children.scatter_(2, level.candidates[:, :, None, None].expand_as(repeated), repeated)


def _keep(children: Tensor, parent_psi: Tensor, width: int) -> _Level:
    """The `width` children [R, M, C, T] with the largest psi."""
    num_candidates = children.shape[2]
    # Rounding must not lift a child above its parent, or the order would not be that of a tree.
    psi = children.sum(-1).minimum(parent_psi[..., None]).flatten(1)
    best = psi.topk(min(width, psi.shape[1]), dim=1)
    return _Level(
        arrive=children.flatten(1, 2)[_request_rows(best.indices), best.indices],
        candidates=best.indices % num_candidates,
        parents=best.indices // num_candidates,
        psi=best.values,
    )


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
