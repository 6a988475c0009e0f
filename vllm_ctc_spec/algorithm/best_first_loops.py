"""The loops of best_first.py, compiled by numba. Letters: see there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    # With a fixed order of summation the compiler could not use vector instructions.
    options = {"fastmath": {"reassoc", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        # numba found no folder for its cache, so each process compiles the function again.
        return njit(**options)(function)


@compiled
def search_all(rows, frames, states, tables, min_psi, is_chain, trees):  # type: ignore[no-untyped-def]
    """Fill `trees` with the search's result.

    rows: [R, C], rows of the candidates in state_in and logit_out. frames: token_logp [R, T, C], tail_mass [R, T].
    states: start, gate [R, r]. tables: state_in [n, r], transition [r, r], logit_out [n, r]. trees: columns (the nodes'
    candidates), parents, depths, psi [R, N] and counts [R], all zero.
    """
    token_logp, tail_mass = frames
    start, gate = states
    state_in, transition, logit_out = tables
    columns, parents, depths, psi, counts = trees
    num_nodes = psi.shape[1]
    num_frames, num_candidates, rank = token_logp.shape[1], token_logp.shape[2], start.shape[1]
    reached = np.empty((num_nodes, rank), np.float32)
    weights = np.empty(num_candidates, np.float32)
    for request in range(len(psi)):
        column, parent, depth, best = columns[request], parents[request], depths[request], psi[request]
        # `best` is in descending order: the nodes of the tree, then the best prefixes outside it.
        size = 0
        for node in range(num_nodes):
            if node > size:
                break
            above = np.float32(1.0)
            frame = 0
            if node == 0:
                reached[0] = start[request]
            else:
                above, frame = best[node - 1], depth[node - 1]
                advance(state_in[rows[request, column[node - 1]]], transition, reached[parent[node - 1]], reached[node])
            if frame == num_frames:
                continue
            scale = above / weigh(
                token_logp[request, frame],
                logit_out,
                rows[request],
                gate[request] * reached[node],
                tail_mass[request, frame],
                weights,
            )
            room = node + 1 if is_chain else num_nodes
            for candidate in range(num_candidates):
                # Rounding must not make a child more probable than its parent.
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


@compiled
def advance(state_in, transition, state, child):  # type: ignore[no-untyped-def]
    """child [r] = state_in + transition @ state"""
    for row in range(len(state_in)):
        total = state_in[row]
        for column in range(len(state)):
            total += transition[row, column] * state[column]
        child[row] = total


@compiled
def weigh(token_logp, logit_out, rows, state, tail_mass, weights):  # type: ignore[no-untyped-def]
    """Write the candidates' unnormalised probabilities into `weights` [C], and return the normaliser.

    Both are relative to the largest. token_logp: [C]. logit_out: [n, r], with the candidates' rows at `rows` [C].
    state: [r], gated. tail_mass: probability of all labels that are not candidates.
    """
    largest = np.float32(math.log(tail_mass)) if tail_mass > 0.0 else np.float32(-np.inf)
    for candidate in range(len(weights)):
        total = token_logp[candidate]
        row = logit_out[rows[candidate]]
        for index in range(len(state)):
            total += row[index] * state[index]
        weights[candidate] = total
        largest = max(largest, total)
    # Labels that are not candidates get no bias.
    total = tail_mass * np.exp(-largest)
    for candidate in range(len(weights)):
        weights[candidate] = np.exp(weights[candidate] - largest)
        total += weights[candidate]
    return total
