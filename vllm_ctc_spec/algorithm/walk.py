"""The exact verification walk: from each node on to the child with the token that the target emits after the node.

The tree depends on the past only, so following the target's choices does not change their distribution, greedy or
sampled.

Letters: R requests, N nodes, D largest possible depth. Node 0 is the anchor, node i is column i - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_tree import TokenTrees


@dataclass(frozen=True)
class AcceptedPaths:
    """The accepted draft nodes of each request, without the target's own token that is emitted after them."""

    nodes: Tensor
    """[R, D] int64, node indices from the anchor's child downwards, padded with -1."""
    num_accepted: Tensor
    """[R] int64, length of the path."""


def child_of(trees: TokenTrees, nodes: Tensor, tokens: Tensor) -> Tensor:
    """[R] int64, the child of `nodes` [R] with the token `tokens` [R]; 0 if there is none."""
    columns = torch.arange(trees.tokens.shape[1], device=nodes.device)
    real = columns < trees.num_nodes[:, None]
    match = real & (trees.parents == nodes[:, None]) & (trees.tokens == tokens[:, None])
    # Siblings have distinct tokens, so at most one column matches, and the sum is its node index.
    return (match * (columns + 1)).sum(1)


def accept_greedy(trees: TokenTrees, choices: Tensor, max_depth: int | None = None) -> AcceptedPaths:
    """Walk each tree along the target's choices.

    choices: [R, N + 1] int64, the token that the target emits after each node, column 0 after the anchor; padding is
    ignored. max_depth: D, at least the depth of every tree; None: N. Nothing waits for the device. Raises ValueError if
    the shape of `choices` is another one.
    """
    num_requests, num_nodes = trees.tokens.shape
    if choices.shape != (num_requests, num_nodes + 1):
        raise ValueError(
            f"choices of shape {tuple(choices.shape)} for {num_requests} trees of {num_nodes} nodes: needs "
            f"{(num_requests, num_nodes + 1)}, one token after the anchor and one after each node."
        )
    index = torch.arange(num_nodes + 1, device=choices.device)
    followed = (index[1:] <= trees.num_nodes[:, None]) & (trees.tokens == choices.gather(1, trees.parents))
    followed_bits = (F.pad(followed.long(), (1, 0), value=1) << index).sum(1, keepdim=True)
    # A node is accepted if and only if the target chose it and each of its ancestors.
    accepted = (trees.ancestor_masks() & ~followed_bits)[:, 1:] == 0

    depth = num_nodes if max_depth is None else max_depth
    # Accepted nodes have distinct depths. All other nodes go to one additional column, which is cut off.
    position = (trees.depths - 1).where(accepted, depth)
    nodes = torch.full((num_requests, depth + 1), -1, dtype=torch.int64, device=choices.device)
    nodes.scatter_(1, position, index[1:].expand_as(position))
    return AcceptedPaths(nodes[:, :depth], accepted.sum(1))
