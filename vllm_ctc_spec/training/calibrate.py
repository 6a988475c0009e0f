"""One factor on all logits, fitted after training, so that a tree's expected accepted length equals the measured one.

The expected accepted length of a tree is the sum of psi, the prefix probability, over its nodes. Cross-entropy
calibrates single tokens. The probability of a path is a product of correlated ones, so the psi of an uncalibrated
drafter is too small at depth, and its trees are too wide. One temperature corrects most of it (Guo et al. 2017, arXiv
1706.04599).

Letters: S anchors, T frames.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter import CTCDrafter, Draft
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of, set_tables_from
from vllm_ctc_spec.training.data import AnchorDataset, TrainingRow, collate_anchors
from vllm_ctc_spec.training.evaluate import walk_text
from vllm_ctc_spec.training.objective import DraftObjective

NUM_NODES = 32
MAX_FACTOR = 2.0
NUM_HALVINGS = 7
"""Bisection steps between 1 / MAX_FACTOR and MAX_FACTOR; seven find the factor to about one percent."""

ANCHORS_PER_ROW = 8
BATCH_SIZE = 16


@dataclass(frozen=True)
class LabelledDraft:
    draft: Draft
    """Of S anchors."""
    labels: Tensor
    """[S, T] int64, the target's text after the anchors."""


@dataclass(frozen=True)
class RowSplit:
    trained: list[TrainingRow]
    calibration: list[TrainingRow]


def split_rows(rows: Sequence[TrainingRow], share: int = 20, max_calibration: int = 64) -> RowSplit:
    """Set apart the first row of every `share`-th prompt for calibration, at most `max_calibration` rows.

    With fewer than `share` prompts none is set apart. The other rows of a calibration prompt are in neither part: a
    drafter that has trained on one answer knows much of the other. Replayed rows must come last; none is set apart.
    """
    by_prompt: dict[tuple[int, ...], list[TrainingRow]] = {}
    for index, row in enumerate(rows):
        by_prompt.setdefault(_prompt(row) or (-1 - index,), []).append(row)
    groups = list(by_prompt.values())
    num_new = sum(not group[0].is_replay for group in groups)
    step = max(share, -(-num_new // max_calibration))
    kept = range(step - 1, num_new, step)
    trained = [row for number, group in enumerate(groups) if number not in kept for row in group]
    return RowSplit(trained, [groups[number][0] for number in kept])


def _prompt(row: TrainingRow) -> tuple[int, ...]:
    """Token ids before the first trained one."""
    return tuple(row.token_ids[: int(row.trained.int().argmax())].tolist())


def calibrate(
    objective: DraftObjective,
    rows: Sequence[TrainingRow],
    seed: int = 0,
    hidden: Callable[[int], Tensor] | None = None,
) -> float:
    """Scale the drafter's logits so that expected and accepted length agree on `rows`, and return the factor.

    rows: the drafter must not have trained on them. hidden: as in `AnchorDataset`; None has the target compute it.
    If no row has an anchor, nothing is scaled and the factor is 1.
    """
    drafter, target = objective.drafter, objective.target
    served = DraftObjective(copy.deepcopy(drafter).to(target.dtype), target).eval()
    set_tables_from(served.drafter, target)
    drafts = _draft(served, rows, seed, hidden)
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
    """Multiply all emission logits by `factor`, the conditioning's part included."""
    drafter.norm.weight.mul_(factor)
    if drafter.config.has_blank:
        drafter.blank_bias.mul_(factor)
    if drafter.config.emission == "conditioned":
        drafter.condition_last.down_proj.weight.mul_(factor)
        # The gate reads the norm's output, and must not change.
        drafter.condition_gate.weight.div_(factor)


@torch.no_grad()
def _draft(
    objective: DraftObjective, rows: Sequence[TrainingRow], seed: int, hidden: Callable[[int], Tensor] | None = None
) -> list[LabelledDraft]:
    num_frames, device = objective.drafter.config.num_frames, objective.target.device
    numbers = [number for number, row in enumerate(rows) if len(row.usable_anchors(num_frames))]
    hidden_of = None if hidden is None else lambda index: hidden(numbers[index])
    dataset = AnchorDataset([rows[number] for number in numbers], num_frames, ANCHORS_PER_ROW, seed, hidden_of)
    drafts = []
    for batch in DataLoader(dataset, BATCH_SIZE, collate_fn=collate_anchors):
        batch = {name: values.to(device) for name, values in batch.items()}
        valid, labels = batch.pop("valid"), batch.pop("labels")
        drafts.append(LabelledDraft(objective.draft(**batch).of(valid), labels[valid]))
    return drafts


@torch.no_grad()
def expected_and_accepted(
    objective: DraftObjective, drafts: Sequence[LabelledDraft], factor: float
) -> tuple[float, float]:
    """Expected and accepted draft tokens, summed over all anchors, with all logits multiplied by `factor`.

    The drafter's tables must be set.
    """
    scaled = copy.deepcopy(objective.drafter)
    scale_logits(scaled, factor)
    if scaled.config.emission == "conditioned":
        assert scaled.state_in_table is not None
        scaled.state_in_table *= factor
    head = head_of(scaled, objective.target.get_output_embeddings().weight)
    expected = accepted = 0.0
    for each in drafts:
        scaled_draft = Draft(each.draft.frames * factor, each.draft.start * factor, each.draft.gate)
        logits = emission_logits(scaled, scaled_draft.frames, head)
        trees = draft_trees(scaled, scaled_draft, logits, NUM_NODES, SpecOptions())
        expected += float(trees.prefix_logp.exp().sum())
        accepted += float(walk_text(trees, each.labels).num_accepted.sum())
    return expected, accepted
