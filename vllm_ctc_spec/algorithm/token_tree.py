"""The token tree, which drafting builds and verification walks.

Letters: R requests, N nodes. Node 0 is the anchor; draft node i (1 <= i <= N) is column i - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenTrees:
    """One token tree per request, nodes in descending prefix probability, parents before children.

    Any leading part of the nodes is a valid tree, so a scheduler may cut a tree short.
    Columns from `num_nodes` on are padding: token 0, parent 0, depth 0, `prefix_logp` -inf.
    """

    tokens: Tensor
    """[R, N] int64, the token of each draft node."""
    parents: Tensor
    """[R, N] int64, node index of the parent, 0 for the anchor."""
    depths: Tensor
    """[R, N] int64, 1 for the anchor's children."""
    prefix_logp: Tensor
    """[R, N] float32, log psi of the prefix that ends in the node."""
    num_nodes: Tensor
    """[R] int64, number of draft nodes without padding."""

    def ancestor_masks(self) -> Tensor:
        """[R, N + 1] int64: bit j of row i is set iff node j is node i or one of its ancestors.

        Padding columns count as children of the anchor. The mask has 64 bits, hence N <= 63.
        """
        num_columns = self.tokens.shape[1]
        above = F.pad(self.parents, (1, 0))
        masks = torch.ones_like(above) << torch.arange(num_columns + 1, device=above.device)
        # Pointer jumping: each round doubles the number of ancestors in a mask, so few rounds serve any depth.
        for _ in range(num_columns.bit_length()):
            masks = masks | masks.gather(1, above)
            above = above.gather(1, above)
        return masks


def check_num_nodes(num_nodes: int) -> None:
    """Raises ValueError if the node budget is below 1."""
    if num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes}: a token tree needs a node budget of at least 1.")
