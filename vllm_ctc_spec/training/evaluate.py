"""Acceptance length without an engine: trees for random anchors, walked along the text that the target wrote.

Letters: S anchors, T frames, N nodes, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from vllm_ctc_spec.algorithm import TokenTrees, accept_greedy
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits
from vllm_ctc_spec.training.data import AnchorCollator, RowDataset, read_rows
from vllm_ctc_spec.training.objective import DraftObjective, target_hidden
from vllm_ctc_spec.training.trainer import load_target

NODE_BUDGETS = (4, 8, 16, 32, 63)


@dataclass(frozen=True)
class Acceptance:
    tree: str
    num_nodes: int
    length: float
    """Mean tokens per target step, the target's own token included."""
    expected: float
    """What the drafter itself believes: 1 + the sum of psi over its nodes."""
    num_anchors: int


def evaluate(
    target_path: str,
    drafter_path: str,
    rows: Path,
    budgets: tuple[int, ...] = NODE_BUDGETS,
    anchors_per_row: int = 8,
    candidates: int = SpecOptions.candidates,
    batch_size: int = 16,
    max_length: int = 1024,
    seed: int = 0,
) -> list[Acceptance]:
    """Acceptance of the chain and of the best tree per node budget, in that order.

    rows: JSONL as for training. Greedy decoding is judged by rows that the target wrote at temperature 0.
    """
    torch.manual_seed(seed)
    target = load_target(target_path)
    drafter = load_drafter(drafter_path, target.dtype)
    objective = DraftObjective(drafter, target, chunk_size=0).eval()
    num_frames = drafter.config.num_frames
    dataset = RowDataset(read_rows(rows, AutoTokenizer.from_pretrained(target_path), max_length), num_frames)
    if not len(dataset):
        raise ValueError(f"{str(rows)!r} has no row with {num_frames + 1} tokens to predict in sequence.")
    loader = DataLoader(dataset, batch_size, collate_fn=AnchorCollator(anchors_per_row, num_frames))
    trees = [(SpecOptions(tree="chain", candidates=candidates), num_frames)]
    trees += [(SpecOptions(candidates=candidates), num_nodes) for num_nodes in budgets]
    sums = torch.zeros(len(trees), 2)
    num_anchors = 0
    for batch in loader:
        valid, labels = batch["valid"], batch["labels"][batch["valid"]]
        logits = _logits(objective, batch)
        anchor_ids = batch["input_ids"].gather(1, batch["anchors"])[valid]
        for index, (options, num_nodes) in enumerate(trees):
            built = draft_trees(drafter, logits, anchor_ids, num_nodes, options)
            sums[index, 0] += accepted_length(built, labels).sum()
            sums[index, 1] += (1 + built.prefix_logp.exp().sum(1)).sum()
        num_anchors += int(valid.sum())
    return [
        Acceptance(options.tree, num_nodes, float(accepted), float(expected), num_anchors)
        for (options, num_nodes), (accepted, expected) in zip(trees, sums / num_anchors, strict=True)
    ]


def accepted_length(trees: TokenTrees, labels: Tensor) -> Tensor:
    """[S] tokens that a step emits when the target goes on with `labels` [S, T]."""
    # After a node of depth d on the right path the target emits label d; off that path any choice will do.
    beyond = labels.new_full((len(labels), 1), -1)
    after_depth = torch.cat((labels, beyond), dim=1)
    depths = torch.cat((torch.zeros_like(beyond), trees.depths), dim=1)
    return 1 + accept_greedy(trees, after_depth.gather(1, depths)).num_accepted


@torch.no_grad()
def _logits(objective: DraftObjective, batch: dict[str, Tensor]) -> Tensor:
    """[S, T, V + 1] of the valid anchors."""
    hidden = target_hidden(objective.target, batch["input_ids"])
    frames = objective.frames(batch["input_ids"], hidden, batch["anchors"])[batch["valid"]]
    return emission_logits(objective.drafter, frames, objective.target.get_output_embeddings())
