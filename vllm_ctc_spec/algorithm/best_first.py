"""The trees of prefix_tree.py for one host core: a best-first search, where no frame is blank.

Since psi never grows along a path, the most probable prefix that is not in the tree is always a child of one that is:
N times the best of them is taken, and its children are looked at. That is N prefixes expanded instead of the up to N
of each level, but one after the other, which suits a CPU as the few large operations of a level suit a GPU.

Letters: R requests, T frames, N nodes, C candidates, r rank of the conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit

from .emissions import ConditionedEmissions
from .token_tree import TokenTrees


def search_prefix_trees(
    emissions: ConditionedEmissions, num_nodes: int, min_prefix_probability: float = 0.0
) -> TokenTrees:
    """As `build_prefix_trees`; tensors on the host, no blank."""
    return _search(emissions, num_nodes, min_prefix_probability, is_chain=False)


def search_chains(emissions: ConditionedEmissions, num_nodes: int) -> TokenTrees:
    """As `build_chains`; tensors on the host, no blank."""
    return _search(emissions, num_nodes, 0.0, is_chain=True)


def _search(emissions: ConditionedEmissions, num_nodes: int, min_psi: float, is_chain: bool) -> TokenTrees:
    if num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes}: a token tree needs a node budget of at least 1.")
    tokens, conditioning = emissions.tokens, emissions.conditioning
    num_requests = len(tokens)
    columns, parents, depths = torch.zeros(3, num_requests, num_nodes, dtype=torch.int64)
    psi = torch.zeros(num_requests, num_nodes)
    counts = torch.zeros(num_requests, dtype=torch.int64)
    tables = (
        emissions.token_logp,
        emissions.outside,
        emissions.start,
        F.embedding(tokens, conditioning.last),
        conditioning.carry,
        emissions.following,
    )
    numbers = (table.detach().float().contiguous().numpy() for table in tables)
    _search_all(*numbers, min_psi, is_chain, *(each.numpy() for each in (columns, parents, depths, psi, counts)))
    real = torch.arange(num_nodes) < counts[:, None]
    return TokenTrees(tokens.gather(1, columns).where(real, 0), parents, depths, psi.log(), counts)


def _compiled(function: Callable[..., Any]) -> Any:
    # Sums may be taken in any order, or they would not use the processor's vectors.
    options = {"fastmath": {"reassoc", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        # There is no folder that it may be kept in; each process compiles it anew.
        return njit(**options)(function)


@_compiled
def _search_all(  # type: ignore[no-untyped-def]
    token_logp, outside, start, last, carry, following, min_psi, is_chain, columns, parents, depths, psi, counts
):
    """token_logp: [R, T, C]; outside: [R, T]; start: [R, r]; last, following: [R, C, r]; carry: [r, r].

    Filled: columns (nodes' candidates), parents, depths, psi: [R, N], zeros before; counts: [R].
    """
    num_nodes = psi.shape[1]
    num_frames, num_candidates, rank = token_logp.shape[1], token_logp.shape[2], start.shape[1]
    states = np.empty((num_nodes, rank), np.float32)
    weights = np.empty(num_candidates, np.float32)
    for request in range(len(psi)):
        column, parent, depth, best = columns[request], parents[request], depths[request], psi[request]
        # `best` is in descending order. The tree's nodes stand before the best prefixes that are not in it yet.
        size = 0
        for node in range(num_nodes):
            if node > size:
                break
            above = np.float32(1.0)
            frame = 0
            if node == 0:
                states[0] = start[request]
            else:
                above, frame = best[node - 1], depth[node - 1]
                _advance(last[request, column[node - 1]], carry, states[parent[node - 1]], states[node])
            if frame == num_frames:
                continue
            scale = above / _weigh(
                token_logp[request, frame], following[request], outside[request, frame], states[node], weights
            )
            room = node + 1 if is_chain else num_nodes
            for candidate in range(num_candidates):
                # Rounding must not lift a child above its parent.
                child = min(weights[candidate] * scale, above)
                if not (child > 0.0 and child >= min_psi) or (size == room and child <= best[size - 1]):
                    continue
                place = size = min(size, room - 1)
                while place > node and best[place - 1] < child:
                    best[place], column[place] = best[place - 1], column[place - 1]
                    parent[place], depth[place] = parent[place - 1], depth[place - 1]
                    place -= 1
                best[place], column[place], parent[place], depth[place] = child, candidate, node, frame + 1
                size += 1
        counts[request] = size


@_compiled
def _advance(last, carry, state, following):  # type: ignore[no-untyped-def]
    """following [r] = last + carry @ state"""
    for row in range(len(last)):
        total = last[row]
        for column in range(len(state)):
            total += carry[row, column] * state[column]
        following[row] = total


@_compiled
def _weigh(token_logp, following, outside, state, weights):  # type: ignore[no-untyped-def]
    """weights [C]: each candidate's share of the sum that is returned; both relative to the largest."""
    largest = np.float32(math.log(outside)) if outside > 0.0 else np.float32(-np.inf)
    for candidate in range(len(weights)):
        total = token_logp[candidate]
        for index in range(len(state)):
            total += following[candidate, index] * state[index]
        weights[candidate] = total
        largest = max(largest, total)
    # What is no candidate has no bias.
    total = outside * np.exp(-largest)
    for candidate in range(len(weights)):
        weights[candidate] = np.exp(weights[candidate] - largest)
        total += weights[candidate]
    return total
