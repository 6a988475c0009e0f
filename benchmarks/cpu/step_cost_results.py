"""Results of `benchmarks.cpu.step_cost`: their file, tables and figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_ctc_spec.tables import markdown_table

OWN_STAGES = ("draft", "build", "walk", "K/V move")
STAGES = ("target", *OWN_STAGES)


@dataclass(frozen=True, order=True)
class Group:
    """Cells that share their plain steps: all node counts of one shape, dtype, context and batch."""

    shape: str
    dtype: str
    context: int
    batch: int


GROUP = tuple(field.name for field in fields(Group))


@dataclass(frozen=True, order=True)
class Cell:
    group: Group
    nodes: int


@dataclass(frozen=True)
class Cost:
    """Milliseconds, medians over rounds."""

    plain: float
    tree: float
    """A step with trees, drafting included."""
    ratio: float
    """Median over rounds of tree / plain."""
    parts: dict[str, float]
    """Of the tree step, by STAGES. The rest of `tree` is vLLM's scheduling and preparation."""
    floor: float
    """Time of the target's matrix products for all rows of the trees over that for one row per request: the smallest
    ratio that this processor allows."""

    @property
    def own_share(self) -> float:
        return sum(self.parts[stage] for stage in OWN_STAGES) / self.tree


@dataclass(frozen=True)
class Failure:
    error: str


Results = dict[Cell, Cost | Failure]


def read_results(path: Path) -> Results:
    """By cell; if a cell has several lines, the last one."""
    results: Results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        values = json.loads(line)
        cell = Cell(Group(*(values.pop(name) for name in GROUP)), values.pop("nodes"))
        results[cell] = Failure(**values) if "error" in values else Cost(**values)
    return results


def append_result(path: Path, cell: Cell, result: Cost | Failure) -> None:
    line = json.dumps({**asdict(cell.group), "nodes": cell.nodes, **asdict(result)})
    with path.open("a") as file:
        file.write(line + "\n")


def markdown(results: Results) -> str:
    tables = [_ratio_table(results), _parts_table(results)]
    failed = [(cell, result.error) for cell, result in sorted(results.items()) if isinstance(result, Failure)]
    if failed:
        rows = (
            [*_name(cell.group), str(cell.nodes), " ".join(error.split()).replace("|", "\\|")] for cell, error in failed
        )
        tables.append(_table([*GROUP, "nodes", "failed with"], rows))
    return "\n".join(tables)


def _ratio_table(results: Results) -> str:
    """Step cost by nodes. Speed-up at acceptance length beta: beta / ratio."""
    node_counts = sorted({cell.nodes for cell in results})
    rows = []
    for group, costs in _by_group(results):
        plain = statistics.median(cost.plain for cost in costs.values())
        ratios = [f"{costs[nodes].ratio:.2f}" if nodes in costs else "" for nodes in node_counts]
        rows.append([*_name(group), f"{plain:.1f}", *ratios])
    heads = [*GROUP, "plain step, ms", *(f"{nodes} nodes / plain" for nodes in node_counts)]
    return _table(heads, rows)


def _parts_table(results: Results) -> str:
    rows = []
    for group, costs in _by_group(results):
        for nodes, cost in costs.items():
            parts = [f"{cost.parts[stage]:.1f}" for stage in STAGES]
            floor, share = f"{cost.floor:.2f}", f"{cost.own_share:.0%}"
            rows.append([*_name(group), str(nodes), f"{cost.tree:.1f}", *parts, share, f"{cost.ratio:.2f}", floor])
    figures = ("step, ms", *STAGES, "own share", "step / plain", "matrix products / plain's")
    heads = [*GROUP, "nodes", *figures]
    return _table(heads, rows)


def _by_group(results: Results) -> list[tuple[Group, dict[int, Cost]]]:
    measured = sorted(cell for cell in results if isinstance(results[cell], Cost))
    return [
        (group, {cell.nodes: cost for cell in cells if isinstance(cost := results[cell], Cost)})
        for group, cells in groupby(measured, key=lambda cell: cell.group)
    ]


def _name(group: Group) -> list[str]:
    return list(map(str, astuple(group)))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"{markdown_table(heads, rows)}\n"


def draw(results: Results, context: int, path: Path) -> None:
    """Step cost ratio over nodes, a line per batch, a panel per shape and dtype."""
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[Group, dict[int, Cost]]]] = {}
    for group, costs in _by_group(results):
        if group.context == context:
            panels.setdefault(f"{group.shape}, {group.dtype}", []).append((group, costs))
    if not panels:
        raise ValueError(f"--png-context {context}: no cell of this context is measured. Add it to --contexts.")
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items()):
        _draw_panel(axes, lines)
        axes.set(title=f"{name}, context {context}", xlabel="nodes verified")
        axes.set_ylabel("tree step / plain step")
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Any, lines: list[tuple[Group, dict[int, Cost]]]) -> None:
    for group, costs in lines:
        axes.plot([0, *costs], [1, *(cost.ratio for cost in costs.values())], marker="o", label=f"batch {group.batch}")
    axes.set_xticks(sorted({0}.union(*(costs for _, costs in lines))))
    axes.grid(alpha=0.3)
    axes.legend()
