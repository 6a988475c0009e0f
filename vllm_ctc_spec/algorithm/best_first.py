"""The trees of prefix_tree.py for one host core: a best-first search, where no frame is blank.

Since psi never grows along a path, the most probable prefix that is not in the tree is always a child of one that is:
N times the best of them is taken, and its children are looked at. That is N prefixes expanded instead of the up to N
of each level, but one after the other, which suits a CPU as the few large operations of a level suit a GPU.

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
    """As `build_prefix_trees`; tensors on the host, no blank."""
    return _search(emissions, num_nodes, min_prefix_probability, is_chain=False)


def search_chains(emissions: ConditionedEmissions, num_nodes: int) -> TokenTrees:
    """As `build_chains`; tensors on the host, no blank."""
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
        # No whole table is converted at every step.
        state_in, logit_out = (F.embedding(tokens, table).flatten(0, 1) for table in (state_in, logit_out))
        rows = torch.arange(tokens.numel()).view_as(tokens)
    # Not before: vLLM looks through all modules when its CPU worker starts, and fails at what llvmlite has in its own
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
