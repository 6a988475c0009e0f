"""The paper's token tree, for comparison: a fixed template filled with top-k labels, then the CTC transform.

arXiv 2412.00061, section 3.2: each frame's most probable labels (blank among them) fill Medusa's 63-node tree
(arXiv 2401.10774, appendix; choices `mc_sim_7b_63`), every path is collapsed (repeats and blanks removed), and paths
that become equal are merged. Written in plain Python, because it is a baseline only.

Letters: R requests, T frames, N nodes, V vocabulary without blank, K most probable labels per frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ctc import collapse
from .token_tree import TokenTrees, check_num_nodes

# One number per node, in Medusa's order. Digit t is the rank of the label that the path takes in frame t.
_RANKS = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 "
    "005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)
MEDUSA_63 = tuple(tuple(map(int, ranks)) for ranks in _RANKS.split())

_Prefix = tuple[int, ...]


def build_template_trees(logits: Tensor, num_nodes: int) -> TokenTrees:
    """Template trees of frame logits [R, T, V + 1] (blank last), at most `num_nodes` nodes each.

    Nodes come in the order in which the template first reaches them. `prefix_logp` is not log psi: it is the largest
    log probability of a single template path that collapses to the prefix or to one of its continuations.
    Waits for the device. Raises ValueError if num_nodes < 1.
    """
    check_num_nodes(num_nodes)
    blank = logits.shape[-1] - 1
    num_ranks = 1 + max(rank for path in MEDUSA_63 for rank in path)
    top = logits.float().log_softmax(-1).topk(min(num_ranks, blank + 1), dim=-1)
    trees = [
        _transform(labels, logp, blank) for labels, logp in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    return _pack([dict(list(tree.items())[:num_nodes]) for tree in trees], num_nodes, logits.device)


def _transform(labels: list[list[int]], logp: list[list[float]], blank: int) -> dict[_Prefix, float]:
    """Collapsed prefixes of one request with their `prefix_logp`, in template order, parents first.

    labels, logp: [T, K], the most probable labels of each frame.
    """
    best: dict[_Prefix, float] = {}
    for path in MEDUSA_63:
        if len(path) > len(labels) or max(path) >= len(labels[0]):
            continue
        path_logp = sum(logp[frame][rank] for frame, rank in enumerate(path))
        if path_logp == -torch.inf:
            continue
        prefix = collapse([labels[frame][rank] for frame, rank in enumerate(path)], blank)
        for length in range(1, len(prefix) + 1):
            best[prefix[:length]] = max(best.get(prefix[:length], -torch.inf), path_logp)
    return best


def _pack(trees: list[dict[_Prefix, float]], num_nodes: int, device: torch.device) -> TokenTrees:
    tokens = torch.zeros(len(trees), num_nodes, dtype=torch.int64)
    parents, depths = torch.zeros_like(tokens), torch.zeros_like(tokens)
    prefix_logp = torch.full(tokens.shape, -torch.inf)
    for request, tree in enumerate(trees):
        node_of = {prefix: node for node, prefix in enumerate(tree, start=1)}
        for column, (prefix, logp) in enumerate(tree.items()):
            tokens[request, column] = prefix[-1]
            parents[request, column] = node_of.get(prefix[:-1], 0)
            depths[request, column] = len(prefix)
            prefix_logp[request, column] = logp
    num_real = torch.tensor([len(tree) for tree in trees], dtype=torch.int64)
    return TokenTrees(*(field.to(device) for field in (tokens, parents, depths, prefix_logp, num_real)))
