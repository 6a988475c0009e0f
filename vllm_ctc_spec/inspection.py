"""Draws the token tree of one decoding step: draft tokens, prefix probabilities and the accepted path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text
from rich.tree import Tree

from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.files import save_png

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class DrawnTree:
    """Entry i of every list is node i; node 0 is the anchor."""

    labels: list[str]
    """Decoded tokens."""
    parents: list[int]
    depths: list[int]
    probabilities: list[float]
    """Prefix probabilities; 1 for the anchor."""
    accepted: set[int]
    """Nodes of the accepted path, the anchor included."""
    emitted: str
    """Text of the accepted path and of the target's own token after it."""

    @property
    def expected_length(self) -> float:
        """Expected tokens of the step: the sum of psi, where the anchor's 1 stands for the target's own token."""
        return sum(self.probabilities)


def draw(
    target: str,
    drafter: str,
    prompt: str | list[int],
    num_nodes: int,
    options: SpecOptions,
    skip: int = 0,
    trust_remote_code: bool = False,
) -> DrawnTree:
    """Run the reference loop on `prompt` (float32, greedy), and return the tree of step `skip + 1`.

    target, drafter: model folders. prompt: text or token ids. trust_remote_code: run the code that the target brings.
    Raises ValueError if the drafter is not the target's, or if the prompt is empty.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_ctc_spec.drafter.checkpoint import check_drafter, load_drafter
    from vllm_ctc_spec.reference import ReferenceStep, decode
    from vllm_ctc_spec.target_files import check_sizes, read_text_config, read_tokenizer

    config = check_drafter(drafter)
    check_sizes(drafter, config, target, read_text_config(target, trust_remote_code))
    tokenizer = read_tokenizer(target, trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    tokens = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    if not tokens:
        raise ValueError("--prompt is empty: the drafter starts from the target's state after a prompt.")
    steps: Iterator[ReferenceStep] = decode(model, load_drafter(drafter, torch.float32), tokens, num_nodes, options)
    last = next(steps)
    for _ in range(skip + 1):
        anchor, last = last.tokens[-1], next(steps)
    count = int(last.tree.num_nodes)
    drafted = last.tree.tokens[0, :count].tolist()
    return DrawnTree(
        [tokenizer.decode([token]) for token in (anchor, *drafted)],
        [0, *last.tree.parents[0, :count].tolist()],
        [0, *last.tree.depths[0, :count].tolist()],
        [1.0, *last.tree.prefix_logp[0, :count].exp().tolist()],
        {0, *last.accepted_nodes},
        tokenizer.decode(last.tokens),
    )


def to_terminal(drawn: DrawnTree) -> Tree:
    """A tree to print. Accepted nodes are green, and marked by a word for terminals without colours."""
    branches: list[Tree] = []
    for node, parent in enumerate(drawn.parents):
        is_taken = node in drawn.accepted
        style = "bold green" if is_taken else "dim"
        role = "anchor" if node == 0 else f"{drawn.probabilities[node]:.3f}" + ", taken" * is_taken
        label = Text.assemble((repr(drawn.labels[node]), style), f"  {role}")
        branches.append(Tree(label) if node == 0 else branches[parent].add(label))
    return branches[0]


def summary(drawn: DrawnTree) -> str:
    return (
        f"{len(drawn.labels) - 1} nodes, expected tokens this step {drawn.expected_length:.2f}, "
        f"emitted {len(drawn.accepted)}: {escape(repr(drawn.emitted))}"
    )


def to_png(drawn: DrawnTree, path: Path) -> None:
    """Draw the tree from left to right, the accepted path in green, edges as wide as their psi. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = _rows(drawn.parents)
    figure = Figure(figsize=(2.2 * (max(drawn.depths) + 1.5), 0.36 * (max(rows) + 3)))
    axes = figure.subplots()
    for node, parent in enumerate(drawn.parents):
        colour = "tab:green" if node in drawn.accepted else "0.55"
        at = (drawn.depths[node], -rows[node])
        if node:
            start = (drawn.depths[parent], -rows[parent])
            axes.plot(*zip(start, at), color=colour, linewidth=0.6 + 3 * drawn.probabilities[node], zorder=1)
        label = f"{drawn.labels[node]!r}\n{drawn.probabilities[node]:.2f}".replace("$", r"\$")
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour}
        axes.text(*at, label, ha="center", va="center", fontsize=7, family="monospace", bbox=box, zorder=2)
    axes.set_xlim(-0.6, max(drawn.depths) + 0.6)
    axes.set_ylim(-max(rows) - 1, 1)
    axes.set_title(f"expected {drawn.expected_length:.2f} tokens, emitted {len(drawn.accepted)}", fontsize=9)
    axes.axis("off")
    save_png(figure, path, dpi=160, bbox_inches="tight")


def _rows(parents: list[int]) -> list[float]:
    """Vertical position of each node, downwards: leaves below one another, a parent level with its first child."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    rows = [0.0] * len(parents)
    next_row = 0.0

    def place(node: int) -> None:
        nonlocal next_row
        for child in children[node]:
            place(child)
        if children[node]:
            rows[node] = rows[children[node][0]]
        else:
            rows[node], next_row = next_row, next_row + 1.4

    place(0)
    return rows
