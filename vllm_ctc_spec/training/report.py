"""Shows an evaluation: as JSON, as tables for the terminal and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from vllm_ctc_spec.files import save_png
from vllm_ctc_spec.training.evaluate import Evaluation, Rate, TreeAcceptance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COUNTS = ("num_anchors", "num_rows", "num_rows_left_out")


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """JSON values; the share of an empty count is null."""
    return {
        **{name: getattr(evaluation, name) for name in _COUNTS},
        "trees": [_tree_fields(tree) for tree in evaluation.trees],
        "reliability": [asdict(each) for each in evaluation.reliability],
        "after_first_choice": asdict(evaluation.after_first_choice),
        "after_sibling": asdict(evaluation.after_sibling),
    }


def _tree_fields(tree: TreeAcceptance) -> dict[str, Any]:
    return asdict(tree) | {
        "depth_shares": list(tree.depth_shares),
        "conditional_shares": list(tree.conditional_shares),
        "expected_over_accepted": tree.expected_over_accepted,
    }


def to_table(evaluation: Evaluation, name: str = "") -> Group:
    """name: of the evaluation set."""
    left_out = f", {evaluation.num_rows_left_out} too short" if evaluation.num_rows_left_out else ""
    counts = f"{evaluation.num_anchors} anchors in {evaluation.num_rows} rows{left_out}"
    first, sibling = _shown(evaluation.after_first_choice), _shown(evaluation.after_sibling)
    return Group(
        _acceptance_table(evaluation, f"Acceptance length, {name}" if name else "Acceptance length", counts),
        _depth_table(evaluation),
        _reliability_table(evaluation),
        f"share of right next tokens: {first} after an accepted first choice, {sibling} after another accepted node",
    )


def _acceptance_table(evaluation: Evaluation, title: str, counts: str) -> Table:
    columns = ("tree", "nodes", "tokens per step", "± standard error", "expected", "expected / accepted drafts")
    table = Table(*columns, title=title, caption=counts)
    for tree in evaluation.trees:
        error, expected, ratio = map(_number, (tree.standard_error, tree.expected, tree.expected_over_accepted))
        table.add_row(tree.tree, str(tree.num_nodes), f"{tree.length:.2f}", error, expected, ratio)
    return table


def _depth_table(evaluation: Evaluation) -> Table:
    num_frames = len(evaluation.trees[0].depth_shares)
    depths = map(str, range(1, num_frames + 1))
    table = Table("tree", "nodes", *depths, title="Accepted to depth (share of those accepted to the depth above)")
    for tree in evaluation.trees:
        both = zip(tree.depth_shares, tree.conditional_shares, strict=True)
        table.add_row(tree.tree, str(tree.num_nodes), *(f"{share:.2f} ({_number(given)})" for share, given in both))
    return table


def _reliability_table(evaluation: Evaluation) -> Table:
    table = Table("psi", "nodes", "mean psi", "share accepted", title="Calibration of the largest prefix tree")
    for each in evaluation.reliability:
        share = _number(each.accepted.share, 4)
        table.add_row(f"{each.lower:g} to {each.upper:g}", str(each.accepted.count), f"{each.mean_psi:.4f}", share)
    return table


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _shown(rate: Rate) -> str:
    return f"{_number(rate.share)} (of {rate.count})"


def to_png(evaluations: Mapping[str, Evaluation], path: Path) -> None:
    """Draw acceptance length over node budget, acceptance per depth, and calibration, in one row per evaluation set.

    The file is written atomically. Raises ValueError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f'{str(path)!r} cannot be drawn without matplotlib: pip install "vllm-ctc-spec[train]".'
        ) from error
    figure = Figure(figsize=(15, 4.6 * len(evaluations)), layout="constrained")
    rows = figure.subfigures(len(evaluations), 1, squeeze=False)[:, 0]
    for row, (name, evaluation) in zip(rows, evaluations.items()):
        row.suptitle(name)
        lengths, depths, reliability = row.subplots(1, 3)
        _draw_lengths(lengths, evaluation)
        _draw_depths(depths, evaluation)
        _draw_reliability(reliability, evaluation)
    save_png(figure, path, dpi=140)


def _draw_lengths(axes: Axes, evaluation: Evaluation) -> None:
    for options, trees in _by_options(evaluation).items():
        budgets, lengths = [tree.num_nodes for tree in trees], [tree.length for tree in trees]
        if options.tree == "chain":
            axes.axhline(lengths[-1], color="0.5", linestyle=":", label="chain")
            continue
        errors = [tree.standard_error or 0.0 for tree in trees]
        drawn = axes.errorbar(budgets, lengths, yerr=errors, marker="o", capsize=3, label=f"{options.tree}, accepted")
        expected = [(tree.num_nodes, tree.expected) for tree in trees if tree.expected is not None]
        if expected:
            colour = drawn.lines[0].get_color()
            axes.plot(*zip(*expected), color=colour, linestyle="--", label=f"{options.tree}, expected (1 + Σψ)")
    axes.set(xlabel="draft nodes", ylabel="tokens per target step", title="Acceptance length")
    axes.grid(alpha=0.3)
    axes.legend()


def _by_options(evaluation: Evaluation) -> dict[Any, list[TreeAcceptance]]:
    groups: dict[Any, list[TreeAcceptance]] = {}
    for tree in sorted(evaluation.trees, key=lambda tree: tree.num_nodes):
        groups.setdefault(tree.options, []).append(tree)
    return groups


def _draw_depths(axes: Axes, evaluation: Evaluation) -> None:
    depths = range(1, len(evaluation.trees[0].depth_shares) + 1)
    for tree in evaluation.trees:
        axes.plot(depths, tree.depth_shares, marker=".", label=f"{tree.tree}, {tree.num_nodes} nodes")
    axes.set(xlabel="depth", ylabel="share of steps that accept it", title="Acceptance per depth", ylim=(0, 1.02))
    axes.set_xticks(depths)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_reliability(axes: Axes, evaluation: Evaluation) -> None:
    points = [(each.mean_psi, each.accepted.share) for each in evaluation.reliability if each.accepted.share]
    lowest = min((min(point) for point in points), default=1e-3) / 2
    axes.plot((lowest, 1), (lowest, 1), color="0.5", linestyle=":", label="calibrated")
    if points:
        axes.plot(*zip(*points), marker="o", label="nodes of the largest prefix tree")
    axes.set(xlabel="mean ψ", ylabel="share accepted", title="Calibration")
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
