"""One factor on all logits, fitted after training, so that a tree's expected accepted length is the measured one.

The expected length is the sum of psi, the prefix probability, over a tree's nodes. Cross-entropy calibrates single
tokens; a path's probability is a product of correlated ones, so an uncalibrated drafter's psi is too small at depth,
and its trees are too wide. One temperature corrects most of it (Guo et al. 2017, arXiv 1706.04599).

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
MAX_FACTOR = 2.0
NUM_HALVINGS = 7
"""Of the interval from 1 / MAX_FACTOR to MAX_FACTOR: to about one percent."""

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
    """Scale the drafter's logits so that expected and accepted length agree on `rows`; returns the factor.

    rows: not trained on. Without any, the factor is 1.
    """
    drafter, target = objective.drafter, objective.target
    served = DraftObjective(copy.deepcopy(drafter).to(target.dtype), target).eval()
    set_tables_from(served.drafter, target)
    drafts = _draft(served, rows, seed)
    if not drafts:
        return 1.0
    low, high = 1 / MAX_FACTOR, MAX_FACTOR
    for _ in range(NUM_HALVINGS):
        factor = (low * high) ** 0.5
        expected, accepted = expected_and_accepted(served, drafts, factor)
        low, high = (factor, high) if expected < accepted else (low, factor)
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
def expected_and_accepted(objective: DraftObjective, drafts: Sequence[_Drafted], factor: float) -> tuple[float, float]:
    """Sums over all anchors, in tokens, with all logits multiplied by `factor`. The drafter's tables must be set."""
    scaled = copy.deepcopy(objective.drafter)
    scale_logits(scaled, factor)
    if scaled.config.emission == "conditioned":
        # The factor scales table A alone; table B stays as it is.
        tokens = torch.arange(scaled.config.vocab_size, device=scaled.device)
        scaled.state_in_table = scaled.condition_last(
            objective.target.get_input_embeddings()(tokens).to(scaled.norm.weight.dtype)
        )
    head = head_of(scaled, objective.target.get_output_embeddings().weight)
    expected = accepted = 0.0
    for draft, labels in drafts:
        scaled_draft = Draft(draft.frames * factor, draft.start * factor, draft.gate)
        logits = emission_logits(scaled, scaled_draft.frames, head)
        trees = draft_trees(scaled, scaled_draft, logits, NUM_NODES, SpecOptions())
        expected += float(trees.prefix_logp.exp().sum())
        accepted += float(walk_text(trees, labels).num_accepted.sum())
    return expected, accepted
