"""Best-first search for the trees of prefix_tree.py, on the CPU, for emissions without a blank.

Since psi never grows along a path, the most probable prefix outside the tree is always a child of a node in it. The
search adds that prefix N times and expands it. It expands N prefixes in all, one after the other, where prefix_tree.py
expands up to N per level in a few large operations, which suits a GPU.

Letters: R requests, T frames, N nodes, C candidates, r rank of the conditioning.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .emissions import ConditionedEmissions
from .token_tree import TokenTrees, check_num_nodes


def search_prefix_trees(
    emissions: ConditionedEmissions, num_nodes: int, min_prefix_probability: float = 0.0
) -> TokenTrees:
    """As `build_prefix_trees`; needs tensors on the CPU and emissions without a blank."""
    return _search(emissions, num_nodes, min_prefix_probability, is_chain=False)


def search_chains(emissions: ConditionedEmissions, num_nodes: int) -> TokenTrees:
    """As `build_chains`; needs tensors on the CPU and emissions without a blank."""
    return _search(emissions, num_nodes, 0.0, is_chain=True)


def _search(emissions: ConditionedEmissions, num_nodes: int, min_psi: float, is_chain: bool) -> TokenTrees:
    check_num_nodes(num_nodes)
    tokens, conditioning = emissions.tokens, emissions.conditioning
    num_requests = len(tokens)
    columns, parents, depths = torch.zeros(3, num_requests, num_nodes, dtype=torch.int64)
    psi = torch.zeros(num_requests, num_nodes)
    counts = torch.zeros(num_requests, dtype=torch.int64)
    state_in, logit_out, rows = conditioning.state_in, conditioning.logit_out, tokens
    if state_in.dtype != torch.float32:
        # Only the candidates' rows are converted, because converting whole tables at every step takes long.
        state_in, logit_out = (F.embedding(tokens, table).flatten(0, 1) for table in (state_in, logit_out))
        rows = torch.arange(tokens.numel()).view_as(tokens)
    # Imported late: when vLLM's CPU worker starts, it inspects all loaded modules and fails on llvmlite's
    # (vllm/triton_utils/dispatcher.py).
    from .best_first_loops import search_all

    search_all(
        rows.numpy(),
        _numbers(emissions.token_logp, emissions.tail_mass),
        _numbers(emissions.start, emissions.gate),
        _numbers(state_in, conditioning.transition, logit_out),
        min_psi,
        is_chain,
        tuple(each.numpy() for each in (columns, parents, depths, psi, counts)),
    )
    real = torch.arange(num_nodes) < counts[:, None]
    return TokenTrees(tokens.gather(1, columns).where(real, 0), parents, depths, psi.log(), counts)


def _numbers(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(tensor.detach().float().contiguous().numpy() for tensor in tensors)
