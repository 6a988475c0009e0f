"""One factor on all logits, after training, that makes the drafter believe what the target accepts.

Cross-entropy calibrates each token on average. A path's probability is a product, and easy text is easy at every
token of it, so the product believes too little until the drafter tells easy text from hard; trees come out too bushy.
One temperature mends most of it (Guo et al. 2017, arXiv 1706.04599), here fitted on what matters: that the sum of psi
over a tree's nodes, its expected accepted length, is the accepted length.

Letters: S anchors, T frames.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter import CTCDrafter, Draft
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of, set_tables_from
from vllm_ctc_spec.training.data import AnchorDataset, TrainingRow, collate_anchors, with_anchors
from vllm_ctc_spec.training.evaluate import walk_text
from vllm_ctc_spec.training.objective import DraftObjective

NUM_NODES = 32
LARGEST_FACTOR = 2.0
NUM_HALVINGS = 7
"""Of the interval from 1 / LARGEST_FACTOR to LARGEST_FACTOR: to about one percent."""

ANCHORS_PER_ROW = 8
BATCH_SIZE = 16


_Drafted = tuple[Draft, Tensor]
"""Of S anchors, and the target's text after them, [S, T] int64."""


def split_rows(
    rows: Sequence[TrainingRow], share: int = 20, most: int = 64
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Rows to train on, and those to calibrate on: one in `share`, at most `most`, or none of fewer than `share`.

    All rows that continue a calibration row's prompt are left out of both: what is learned from them is known there.
    """
    by_prompt: dict[tuple[int, ...], list[TrainingRow]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(_prompt(row) or (-1 - index,), []).append(row)
    step = max(share, -(-len(by_prompt) // most))
    groups = list(by_prompt.values())
    kept = range(step - 1, len(groups), step)
    trained = [row for number, group in enumerate(groups) if number not in kept for row in group]
    return trained, [groups[number][0] for number in kept]


def _prompt(row: TrainingRow) -> tuple[int, ...]:
    """The tokens before the first trained one."""
    return tuple(row.token_ids[: int(row.trained.int().argmax())].tolist())


def calibrate(objective: DraftObjective, rows: Sequence[TrainingRow], seed: int = 0) -> float:
    """Scale the drafter's logits so that it believes on `rows`, not trained on, what is accepted; return the factor."""
    drafter, target = objective.drafter, objective.target
    served = DraftObjective(copy.deepcopy(drafter).to(target.dtype), target).eval()
    drafts = _draft(served, rows, seed)
    if not drafts:
        return 1.0
    low, high = 1 / LARGEST_FACTOR, LARGEST_FACTOR
    for _ in range(NUM_HALVINGS):
        factor = (low * high) ** 0.5
        believed, accepted = _expectations(served, drafts, factor)
        low, high = (factor, high) if believed < accepted else (low, factor)
    factor = (low * high) ** 0.5
    scale_logits(drafter, factor)
    return factor


@torch.no_grad()
def scale_logits(drafter: CTCDrafter, factor: float) -> None:
    """Multiply all emission logits, conditioning included."""
    drafter.norm.weight.mul_(factor)
    if drafter.config.has_blank:
        drafter.blank_bias.mul_(factor)
    if drafter.config.emission == "conditioned":
        drafter.condition_last.down_proj.weight.mul_(factor)
        # The gate reads what the norm writes, and must stay what it is.
        drafter.condition_gate.weight.div_(factor)


@torch.no_grad()
def _draft(objective: DraftObjective, rows: Sequence[TrainingRow], seed: int) -> list[_Drafted]:
    num_frames, device = objective.drafter.config.num_frames, objective.target.device
    dataset = AnchorDataset(with_anchors(rows, num_frames), num_frames, ANCHORS_PER_ROW, seed)
    drafts = []
    for batch in DataLoader(dataset, BATCH_SIZE, collate_fn=collate_anchors):
        input_ids, anchors, valid, labels = (
            batch[name].to(device) for name in ("input_ids", "anchors", "valid", "labels")
        )
        drafts.append((objective.draft(input_ids, anchors).of(valid), labels[valid]))
    return drafts


@torch.no_grad()
def _expectations(objective: DraftObjective, drafts: Sequence[_Drafted], factor: float) -> tuple[float, float]:
    """Drafts believed to be accepted, and accepted, with all logits multiplied by `factor`."""
    scaled = copy.deepcopy(objective.drafter)
    scale_logits(scaled, factor)
    set_tables_from(scaled, objective.target)
    head = head_of(scaled, objective.target.get_output_embeddings().weight)
    believed = accepted = 0.0
    for draft, labels in drafts:
        louder = Draft(draft.frames * factor, draft.start * factor, draft.gate)
        logits = emission_logits(scaled, louder.frames, head)
        trees = draft_trees(scaled, louder, logits, NUM_NODES, SpecOptions())
        believed += float(trees.prefix_logp.exp().sum())
        accepted += float(walk_text(trees, labels).num_accepted.sum())
    return believed, accepted
