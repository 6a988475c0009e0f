"""The best token tree of a CTC drafter: the N prefixes with the largest prefix probability psi.

psi never grows along a path, so the N prefixes with the largest psi form a connected tree, and no other tree of N nodes
has a larger expected accepted length. The tree is built level by level. A level extends its prefixes by all candidates
and keeps the best N, less the number of ancestors that these need; the best N of all levels are the tree. Extending is
the part of a family of emissions: `_Aligned` below for the default family, which has no blank, the classes in
blank_families.py for families with one.

The computation uses float32 probabilities, not logarithms. It only adds and multiplies non-negative numbers, so nothing
cancels, and the relative error stays within a few T ulps. Probabilities below 1e-38 underflow and count as impossible;
with a blank, so do tokens whose frame and prefix factors differ by more than 87 nats. Results are logarithms.

Letters: R requests, T frames, N nodes, C candidates, M prefixes kept at a level, r rank of the conditioning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blank_families import ConditionedProcess, IndependentProcess
from .emissions import ConditionedEmissions, IndependentEmissions
from .levels import Children, Chosen, Level, Process, request_rows
from .token_tree import TokenTrees, check_num_nodes


def build_prefix_trees(
    emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int, min_prefix_probability: float = 0.0
) -> TokenTrees:
    """The trees of the `num_nodes` prefixes with the largest psi, in descending psi.

    Prefixes with psi 0 or below `min_prefix_probability` become padding. Fixed shapes; nothing waits for the device.
    Raises ValueError if num_nodes < 1.
    """
    return _build(emissions, num_nodes, num_nodes, min_prefix_probability)


def build_chains(emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int) -> TokenTrees:
    """The greedy paths: from each prefix to its child with the largest psi, at most min(T, num_nodes) tokens.

    Columns beyond T are padding, as are prefixes with psi 0. Raises ValueError if num_nodes < 1.
    """
    return _build(emissions, num_nodes, 1, 0.0)


class _Aligned:
    """Conditioned emissions without a blank: token j stands at frame j, so psi(h.c) = psi(h) p_j(c | h)."""

    def __init__(self, emissions: ConditionedEmissions) -> None:
        self._conditioning = emissions.conditioning
        self._start = emissions.start[:, None]
        self._frames = torch.cat((emissions.token_logp, emissions.tail_mass.log()[..., None]), dim=-1)[:, :, None]
        # Labels that are not candidates get no bias.
        self._logit_rows = F.pad(emissions.logit_rows(), (0, 0, 0, 1)).mT

    def _children(self, psi: Tensor, states: Tensor, depth: int) -> Children:
        bias = states.bmm(self._logit_rows).float()
        probability = bias.add_(self._frames[:, depth]).softmax(-1)[..., :-1]
        return Children(psi, states, probability * psi[..., None], lambda chosen: chosen.psi[..., None])

    def first(self) -> Children:
        return self._children(torch.ones_like(self._frames[:, 0, :, 0]), self._start, 0)

    def children(self, level: Level, depth: int) -> Children:
        return self._children(level.psi, level.states, depth)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self._conditioning.advance(states, tokens)


def _process(emissions: IndependentEmissions | ConditionedEmissions) -> Process:
    if isinstance(emissions, IndependentEmissions):
        return IndependentProcess(emissions)
    if emissions.blank_logp is None:
        return _Aligned(emissions)
    return ConditionedProcess(emissions, emissions.blank_logp)


def _build(
    emissions: IndependentEmissions | ConditionedEmissions, num_nodes: int, width: int, min_psi: float
) -> TokenTrees:
    check_num_nodes(num_nodes)
    process, tokens = _process(emissions), emissions.tokens
    request = request_rows(tokens)
    levels = [_keep(process, process.first(), request, tokens, width)]
    for depth in range(1, min(emissions.token_logp.shape[1], num_nodes)):
        # A node at this level needs `depth` ancestors in the tree.
        levels.append(
            _keep(process, process.children(levels[-1], depth), request, tokens, min(width, num_nodes - depth))
        )
    return _assemble(levels, tokens, num_nodes, min_psi)


def _keep(process: Process, children: Children, request: Tensor, tokens: Tensor, width: int) -> Level:
    """The `width` children with the largest psi; request: [R, 1] 0 .. R - 1."""
    # Rounding must not make a child more probable than its parent, or it would come before it in the tree.
    psi = children.psi.minimum(children.parents_psi[..., None]).flatten(1)
    best = psi.topk(min(width, psi.shape[1]), dim=1)
    num_candidates = tokens.shape[1]
    row, column = best.indices // num_candidates, best.indices % num_candidates
    states = process.advance(children.parents_states[request, row], tokens[request, column])
    return Level(children.arrive(Chosen(request, row, column, best.values)), column, row, best.values, states)


def _assemble(levels: list[Level], tokens: Tensor, num_nodes: int, min_psi: float) -> TokenTrees:
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
    # More than any prefix can have, so that the anchor is sorted to node 0.
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
