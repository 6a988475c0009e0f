"""Three figures: how much faster, acceptance length, and acceptance per depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ctc_spec.bench.config import PLAIN
from vllm_ctc_spec.bench.ratio import CONFIDENCE
from vllm_ctc_spec.bench.sampling import Sampling
from vllm_ctc_spec.files import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = list[dict[str, Any]]


def draw(results: dict[str, Any], output: Path) -> list[str]:
    """Write the figures into `output`; returns their names. One row per prompts, one column per sampling."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels: dict[str, Cells] = {}
    for cell in results["cells"]:
        panels.setdefault(f"{cell['prompts']}, {Sampling(**cell['sampling'])}", []).append(cell)
    num_rows = len({cell["prompts"] for cell in results["cells"]})
    num_columns = len(panels) // num_rows
    drawings = {"ratio.png": _draw_ratios, "beta.png": _draw_betas, "depth.png": _draw_depths}
    for name, drawing in drawings.items():
        figure = Figure(figsize=(8 * num_columns, 4.8 * num_rows), layout="constrained")
        for axes, (title, cells) in zip(figure.subplots(num_rows, num_columns, squeeze=False).flat, panels.items()):
            # A run may have more methods than matplotlib's own cycle has colors.
            axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
            drawing(axes, cells)
            axes.set_title(title)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        save_png(figure, output / name, dpi=130)
    return list(drawings)


def _methods(cells: Cells) -> list[str]:
    return list(dict.fromkeys(name for cell in cells for name in cell["methods"] if name != PLAIN))


def _draw_ratios(axes: Axes, cells: Cells) -> None:
    axes.axhline(1, color="0.5", linestyle=":", label=PLAIN)
    for number, name in enumerate(_methods(cells)):
        measured = [cell for cell in cells if name in cell["methods"]]
        ratios = [cell["methods"][name]["ratio"] for cell in measured]
        # Side by side, or the intervals hide one another.
        batches = [cell["batch_size"] * 1.03**number for cell in measured]
        below = [ratio["mean"] - ratio["low"] for ratio in ratios]
        above = [ratio["high"] - ratio["mean"] for ratio in ratios]
        means = [ratio["mean"] for ratio in ratios]
        axes.errorbar(batches, means, yerr=(below, above), marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    # Twice as fast and half as fast are equally far from plain.
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks([cell["batch_size"] for cell in cells], [str(cell["batch_size"]) for cell in cells])
    axes.set(xlabel="batch size", ylabel=f"tokens/s / plain vLLM's, {CONFIDENCE:.0%} interval")


def _draw_betas(axes: Axes, cells: Cells) -> None:
    names = _methods(cells)
    width = 0.8 / len(cells)
    for number, cell in enumerate(cells):
        measured = [(index, name) for index, name in enumerate(names) if name in cell["methods"]]
        heights = [cell["methods"][name]["overall"]["beta"] for _, name in measured]
        places = [index + (number - (len(cells) - 1) / 2) * width for index, _ in measured]
        axes.bar(places, heights, width, label=f"batch {cell['batch_size']}")
    axes.axhline(1, color="0.5", linestyle=":", label=PLAIN)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel="β: tokens per decoding step")


def _draw_depths(axes: Axes, cells: Cells) -> None:
    """Of the smallest batch: acceptance hardly depends on it."""
    from matplotlib.ticker import MaxNLocator

    cell = min(cells, key=lambda each: int(each["batch_size"]))
    for name, method in cell["methods"].items():
        rates = method["acceptance_by_depth"]
        if rates:
            axes.plot(range(1, len(rates) + 1), rates, marker=".", label=f"{name}, batch {cell['batch_size']}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="depth", ylabel="accepted, of those one above", ylim=(0, 1.02))
