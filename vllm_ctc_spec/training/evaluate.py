"""Judges a drafter without an engine: trees for random anchors are walked along text that the target wrote.

Letters: S anchors, T frames, N nodes, K trees judged, V vocabulary without blank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from vllm_ctc_spec.algorithm import (
    AcceptedPaths,
    TokenTrees,
    accept_greedy,
    conditioned_next_tokens,
    independent_next_tokens,
)
from vllm_ctc_spec.config import MAX_FRAMES, MAX_NODES, SpecOptions, check_node_budget
from vllm_ctc_spec.drafter import CTCDrafter, Draft
from vllm_ctc_spec.drafter.checkpoint import check_drafter, load_drafter
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of, over_all_tokens, set_tables_from
from vllm_ctc_spec.training.data import AnchorDataset, collate_anchors, read_rows, with_anchors
from vllm_ctc_spec.training.models import load_target
from vllm_ctc_spec.training.objective import DraftObjective


class TreeChoice(NamedTuple):
    options: SpecOptions
    num_nodes: int
    """Node budget."""


NODE_BUDGETS = (4, 8, 16, 32, MAX_NODES)
CHAIN = TreeChoice(SpecOptions(tree="chain"), MAX_FRAMES)
PAPER_TREE = TreeChoice(SpecOptions(tree="template"), MAX_NODES)
CALIBRATION_TREE = TreeChoice(SpecOptions(), MAX_NODES)
TREES = (CHAIN, *(TreeChoice(SpecOptions(), num_nodes) for num_nodes in NODE_BUDGETS))

PSI_EDGES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the calibration's bins. Most nodes of a large tree are improbable, so bins of equal width would put nearly
all of them into the first.
"""


@dataclass(frozen=True)
class Rate:
    share: float | None
    """Hits / count; None if the count is 0."""
    count: int


@dataclass(frozen=True)
class TreeAcceptance:
    options: SpecOptions
    num_nodes: int
    length: float
    """Acceptance length beta: mean tokens per target step, the target's own token included."""
    standard_error: float | None
    """Of `length`, computed over rows, because anchors of one row are correlated; None for a single row."""
    expected: float | None
    """Acceptance length that the drafter expects: 1 + the sum of psi over the nodes; None for the template tree, which
    has no psi."""
    depth_shares: tuple[float, ...]
    """[T], share of anchors whose accepted path reaches depth 1 .. T."""

    @property
    def tree(self) -> str:
        return self.options.tree

    @property
    def conditional_shares(self) -> tuple[float | None, ...]:
        """[T], share of the anchors whose path reaches depth d, among those whose path reaches depth d - 1."""
        above = (1.0, *self.depth_shares[:-1])
        return tuple(share / reached if reached else None for share, reached in zip(self.depth_shares, above))

    @property
    def expected_over_accepted(self) -> float | None:
        """Expected / accepted number of draft tokens, (expected - 1) / (length - 1); 1 is calibrated."""
        return None if self.expected is None or self.length == 1 else (self.expected - 1) / (self.length - 1)


@dataclass(frozen=True)
class ReliabilityBin:
    """Nodes whose psi lies in (lower, upper]."""

    lower: float
    upper: float
    mean_psi: float
    accepted: Rate
    """Share of these nodes that were accepted."""


@dataclass(frozen=True)
class Evaluation:
    trees: tuple[TreeAcceptance, ...]
    reliability: tuple[ReliabilityBin, ...]
    """Of CALIBRATION_TREE; bins without a node are left out."""
    after_first_choice: Rate
    """How often the drafter's most probable next token is right after an accepted node of CALIBRATION_TREE that has the
    largest psi of its siblings."""
    after_sibling: Rate
    """The same after an accepted node that has not."""
    num_anchors: int
    num_rows: int
    num_rows_left_out: int
    """Rows without T + 1 trained tokens in sequence."""


@dataclass(frozen=True)
class Observations:
    """Raw results for S anchors, which `summarise` counts. `psi` and all below are of CALIBRATION_TREE."""

    rows: Tensor
    """[S] int64, the anchor's row."""
    num_accepted: Tensor
    """[S, K] int64, accepted draft tokens of each tree."""
    expected: Tensor
    """[S, K], draft tokens expected to be accepted: the sum of psi over each tree's nodes."""
    psi: Tensor
    """[S, N], 0 for padding."""
    on_path: Tensor
    """[S, N] bool, true for accepted nodes."""
    accepted: Tensor
    """[S, T - 1] bool, whether a node at depth 1 .. T - 1 was accepted."""
    first_choice: Tensor
    """[S, T - 1] bool, whether that node has the largest psi of its siblings."""
    right_next: Tensor
    """[S, T - 1] bool, whether the most probable token after 1 .. T - 1 tokens of the text is the text's next one."""


def evaluate(
    target_path: str,
    drafter_path: str,
    rows: str | Path,
    trees: Sequence[TreeChoice] = TREES,
    anchors_per_row: int = 8,
    batch_size: int = 16,
    max_length: int = 1024,
    seed: int = 0,
    skipped: list[str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Judge `trees`, and the drafter's calibration and next tokens, on random anchors.

    rows, skipped, chat_template_kwargs: see `read_rows`. Rows that the target wrote at temperature 0 judge greedy
    decoding. Raises ValueError if no row has T + 1 trained tokens in sequence.
    """
    num_frames = check_drafter(drafter_path).num_frames
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(target_path).to(device)
    drafter = load_drafter(drafter_path, target.dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(target_path)
    all_rows = read_rows(rows, tokenizer, max_length, skipped, chat_template_kwargs=chat_template_kwargs)
    usable = with_anchors(all_rows, num_frames)
    if not usable:
        raise ValueError(f"{str(rows)!r} has no row with {num_frames + 1} tokens to predict in sequence.")
    dataset = AnchorDataset(usable, num_frames, anchors_per_row, seed)
    loader = DataLoader(dataset, batch_size, collate_fn=collate_anchors)
    objective = DraftObjective(drafter, target).eval()
    set_tables_from(drafter, target)
    head = head_of(drafter, target.get_output_embeddings().weight)
    parts, num_rows = [], 0
    for batch in loader:
        on_device = {name: values.to(device) for name, values in batch.items()}
        parts.append(_observe_batch(objective, head, on_device, trees))
        parts[-1] = dataclasses.replace(parts[-1], rows=parts[-1].rows + num_rows)
        num_rows += len(batch["valid"])
    return summarise(_concatenate(parts), trees, num_rows_left_out=len(all_rows) - len(usable))


@torch.no_grad()
def _observe_batch(
    objective: DraftObjective, head: Callable[[Tensor], Tensor], batch: dict[str, Tensor], trees: Sequence[TreeChoice]
) -> Observations:
    """Observations of the batch's valid anchors; `rows` are numbered within the batch."""
    input_ids, anchors, valid = batch["input_ids"], batch["anchors"], batch["valid"]
    draft = objective.draft(input_ids, anchors).of(valid)
    rows = valid.nonzero()[:, 0]
    logits = emission_logits(objective.drafter, draft.frames, head)
    return observe(objective.drafter, draft, logits, batch["labels"][valid], rows, trees)


def observe(
    drafter: CTCDrafter, draft: Draft, logits: Tensor, labels: Tensor, rows: Tensor, trees: Sequence[TreeChoice]
) -> Observations:
    """draft: of S anchors; logits: from `emission_logits`; labels: [S, T] int64, the text after the anchor; rows: [S]
    int64, the anchors' rows."""
    largest: dict[SpecOptions, int] = {}
    for options, num_nodes in (*trees, CALIBRATION_TREE):
        largest[options] = max(largest.get(options, 0), check_node_budget(num_nodes))
    built = {options: draft_trees(drafter, draft, logits, largest[options], options) for options in largest}
    judged = [_first_nodes(built[options], num_nodes) for options, num_nodes in trees]

    tree = built[CALIBRATION_TREE[0]]
    path = walk_text(tree, labels)
    # Column 0 collects the padding of the paths, column 1 is the anchor.
    on_path = path.nodes.new_zeros(len(labels), tree.tokens.shape[1] + 2).scatter_(1, path.nodes + 1, 1)[:, 2:] > 0
    with_next = path.nodes[:, :-1]
    observed = Observations(
        rows=rows,
        num_accepted=torch.stack([walk_text(each, labels).num_accepted for each in judged], dim=1),
        expected=torch.stack([each.prefix_logp.exp().sum(1) for each in judged], dim=1),
        psi=tree.prefix_logp.exp(),
        on_path=on_path,
        accepted=with_next > 0,
        first_choice=_best_of_siblings(tree).gather(1, (with_next - 1).clamp(min=0)),
        right_next=(_next_tokens(drafter, draft, logits, labels) == labels)[:, 1:],
    )
    return Observations(*(getattr(observed, field.name).cpu() for field in dataclasses.fields(observed)))


def summarise(observed: Observations, trees: Sequence[TreeChoice], num_rows_left_out: int) -> Evaluation:
    return Evaluation(
        trees=tuple(_acceptance(observed, index, choice) for index, choice in enumerate(trees)),
        reliability=_reliability(observed.psi, observed.on_path),
        after_first_choice=_rate(observed.right_next, observed.accepted & observed.first_choice),
        after_sibling=_rate(observed.right_next, observed.accepted & ~observed.first_choice),
        num_anchors=len(observed.rows),
        num_rows=len(observed.rows.unique()),
        num_rows_left_out=num_rows_left_out,
    )


def standard_error(values: Tensor, clusters: Tensor) -> float | None:
    """Standard error of the mean of values [S] that are independent only between clusters [S]; None for one cluster."""
    names, index = clusters.unique(return_inverse=True)
    if len(names) == 1:
        return None
    deviations = torch.zeros(len(names), dtype=torch.float64).index_add(0, index, (values - values.mean()).double())
    return float((deviations.square().sum() * len(names) / (len(names) - 1)).sqrt() / len(values))


def _acceptance(observed: Observations, index: int, choice: TreeChoice) -> TreeAcceptance:
    options, num_nodes = choice
    accepted = observed.num_accepted[:, index]
    num_frames = observed.accepted.shape[1] + 1
    reached = accepted[:, None] >= torch.arange(1, num_frames + 1)
    return TreeAcceptance(
        options=options,
        num_nodes=min(num_nodes, num_frames) if options.tree == "chain" else num_nodes,
        length=1 + float(accepted.double().mean()),
        standard_error=standard_error(accepted.double(), observed.rows),
        expected=None if options.tree == "template" else 1 + float(observed.expected[:, index].double().mean()),
        depth_shares=tuple(reached.double().mean(0).tolist()),
    )


def _reliability(psi: Tensor, on_path: Tensor) -> tuple[ReliabilityBin, ...]:
    bins = []
    for lower, upper in pairwise(PSI_EDGES):
        inside = (psi > lower) & (psi <= upper)
        accepted = _rate(on_path, inside)
        if accepted.count:
            bins.append(ReliabilityBin(lower, upper, float(psi[inside].double().mean()), accepted))
    return tuple(bins)


def _rate(hits: Tensor, among: Tensor) -> Rate:
    count = int(among.sum())
    return Rate(int((hits & among).sum()) / count if count else None, count)


def _first_nodes(trees: TokenTrees, num_nodes: int) -> TokenTrees:
    """The trees of a smaller node budget: nodes come in descending psi, so these are the leading nodes."""
    return TokenTrees(
        tokens=trees.tokens[:, :num_nodes],
        parents=trees.parents[:, :num_nodes],
        depths=trees.depths[:, :num_nodes],
        prefix_logp=trees.prefix_logp[:, :num_nodes],
        num_nodes=trees.num_nodes.clamp(max=num_nodes),
    )


def walk_text(trees: TokenTrees, labels: Tensor) -> AcceptedPaths:
    """The accepted paths if the target's next tokens are `labels` [S, T]."""
    # After a node of depth d on the text's path the target emits label d. Off that path its choice does not matter.
    beyond = labels.new_full((len(labels), 1), -1)
    after_depth = torch.cat((labels, beyond), dim=1)
    depths = torch.cat((torch.zeros_like(beyond), trees.depths), dim=1)
    return accept_greedy(trees, after_depth.gather(1, depths), max_depth=labels.shape[1])


def _best_of_siblings(trees: TokenTrees) -> Tensor:
    """[S, N] bool, true for nodes with the largest psi of their siblings: no earlier node has the same parent."""
    siblings = trees.parents[:, :, None] == trees.parents[:, None]
    return ~siblings.tril(-1).any(-1)


def _next_tokens(drafter: CTCDrafter, draft: Draft, logits: Tensor, labels: Tensor) -> Tensor:
    """[S, T] int64, the drafter's most probable token after 0 .. T - 1 tokens of `labels`."""
    logits = over_all_tokens(drafter, logits)
    if drafter.config.emission == "independent":
        return independent_next_tokens(logits, labels)
    return conditioned_next_tokens(logits, draft.start, draft.gate, drafter.conditioning, labels)


def _concatenate(parts: Sequence[Observations]) -> Observations:
    names = [field.name for field in dataclasses.fields(Observations)]
    return Observations(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
