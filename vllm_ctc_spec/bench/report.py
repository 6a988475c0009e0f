"""Shows results.json: report.md, three figures, and a table for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vllm_ctc_spec.bench.cells import CONFIDENCE
from vllm_ctc_spec.bench.config import PLAIN
from vllm_ctc_spec.bench.equality import NEAR_TIE_STEPS
from vllm_ctc_spec.bench.records import Sampling
from vllm_ctc_spec.bench.worker_extension import STAGES
from vllm_ctc_spec.files import save_png
from vllm_ctc_spec.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MAX_LISTED = 20
"""Most differing answers of a method in a cell that the report lists."""

MAX_ERROR = 300
"""Most characters of an error that the report shows."""

COLUMNS = (
    "method", "tokens/s", "× plain", f"{CONFIDENCE:.0%} interval", "β", "γ", "accepted length", "nodes/step",
    "first token, ms", "per token, ms", "memory, MiB", "equal", "near-tie", "different", "exact",
)  # fmt: skip

LEGEND = """\
The engines of all methods are in memory at the same time, and all but one are stopped (SIGSTOP). In every round each
method runs all prompts of the cell once, in the order of the table; a first, unmeasured round warms up. "Batch b" means
b requests in flight: when one ends, the next is added.

* **tokens/s**: generated tokens over wall time, median over rounds, prefill included.
* **× plain**: tokens/s over plain vLLM's in the same round, geometric mean over rounds, with Student's t interval on
  its logarithm.
* **β**: generated tokens per decoding step, without the prefill and its token; steps without a draft count. **γ**: mean
  time per token, plain vLLM's over the method's, measured per request. (arXiv 2412.00061, equations 12, 13.)
* **accepted length**: vLLM's definition, 1 + accepted tokens / steps with a draft; **nodes/step**: draft tokens per
  step with a draft.
* **first token**, **per token**: medians over requests. **memory**: peak resident size of the method's processes (pages
  that they share count in each), on a GPU torch's peak.
* **equal / near-tie / different**: numbers of prompts, each by its worst answer in all rounds, compared with plain
  vLLM's warm-up answers; the row of plain shows how repeatable plain vLLM is. {rule}
* **exact**: nothing is different. A dash where equality is not promised: for sampled text in 16 bits, and for vLLM's
  own methods, whose rejection sampling draws other random numbers from a seed than plain sampling."""

FLOAT32 = "In float32 every token must be the same."
NEAR_TIE = (
    "Greedy text may differ from plain vLLM's from a near-tie on: the lower one of the two tokens' logits is at most "
    f"{NEAR_TIE_STEPS} steps of {{dtypes}} below plain vLLM's best logit. A step is the distance of neighbouring "
    "numbers of that type at the best logit: in bfloat16 0.125 from 16 to 32, and 0.25 from 32 to 64."
)


def render(results: dict[str, Any], plots: Sequence[str]) -> str:
    machine, config = results["machine"], results["config"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    hardware = [machine["cpu"], f"{machine['num_cores']} cores", f"{machine['memory_gib']} GiB", machine["gpu"]]
    dtypes = {cell["methods"][PLAIN]["engine"]["dtype"] for cell in results["cells"]}
    rule = FLOAT32 if dtypes == {"float32"} else NEAR_TIE.format(dtypes=", ".join(sorted(dtypes)))
    parts = [
        "# Benchmark",
        f"{results['date']}; {', '.join(filter(None, hardware))}; {versions}.",
        f"Target `{config['target']}`, {', '.join(sorted(dtypes))}; {config['rounds']} rounds, at most "
        f"{config['max_tokens']} tokens per answer, seed {config['seed']}.",
        LEGEND.format(rule=rule),
        *(f"![{name.removesuffix('.png')}]({name})" for name in plots),
        *(_cell(cell, config) for cell in results["cells"]),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(cell: dict[str, Any], config: dict[str, Any]) -> str:
    title = f"## {cell['prompts']}, batch {cell['batch_size']}, {Sampling(**cell['sampling'])}"
    count = (
        f"{len(cell['prompt_names'])} prompts; the machine's load average at the start was {cell['load_average']:.1f}."
    )
    parts = [title, count, markdown_table(COLUMNS, [_row(*each) for each in cell["methods"].items()])]
    parts += [_eager(cell), _errors(cell), _depths(cell), _stages(cell), _categories(cell), _differences(cell)]
    return "\n\n".join(part for part in parts if part)


def _row(name: str, method: dict[str, Any]) -> list[str]:
    ratio, same, overall = method["ratio"], method["equality"], method["overall"]
    return [
        name,
        f"{statistics.median(method['tokens_per_second']):.1f}",
        "1" if name == PLAIN else f"{ratio['mean']:.3f}",
        "" if name == PLAIN else f"{ratio['low']:.3f} to {ratio['high']:.3f}",
        f"{overall['beta']:.2f}",
        f"{overall['gamma']:.2f}",
        _number(method["acceptance_length"], 2),
        _number(method["nodes_per_step"], 1),
        f"{method['first_token_ms']:.1f}",
        f"{method['per_token_ms']:.2f}",
        f"{method['peak_memory'] / 2**20:.0f}",
        *(str(same[key]) for key in ("equal", "near_tie", "different")),
        {True: "true", False: "**false**", None: "-"}[same["exact"]],
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _eager(cell: dict[str, Any]) -> str:
    eager = [name for name, method in cell["methods"].items() if method["engine"]["is_eager"]]
    return f"Without compilation (`enforce_eager`): {', '.join(eager)}." if eager else ""


def _errors(cell: dict[str, Any]) -> str:
    # Cut, because pydantic's errors fill pages; results.json has the whole text.
    lines = [f"* {name}: {shorten(error, MAX_ERROR)}" for name, error in cell["errors"].items()]
    return "\n".join(("Not measured:", "", *lines)) if lines else ""


def _depths(cell: dict[str, Any]) -> str:
    by_depth = {name: each["acceptance_by_depth"] for name, each in cell["methods"].items()}
    deepest = max(map(len, by_depth.values()))
    rows = [
        [name, *(f"{rate:.2f}" for rate in rates), *([""] * (deepest - len(rates)))]
        for name, rates in by_depth.items()
        if rates
    ]
    columns = ("share accepted at depth, of those accepted above", *map(str, range(1, deepest + 1)))
    return markdown_table(columns, rows) if rows else ""


def _stages(cell: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{method['stages_ms'][stage]:.2f}" for stage in STAGES)]
        for name, method in cell["methods"].items()
        if method["stages_ms"]
    ]
    return markdown_table(("ms per step, median, measured in a separate pass", *STAGES), rows) if rows else ""


def _categories(cell: dict[str, Any]) -> str:
    names = list(cell["methods"][PLAIN]["categories"])
    if len(names) < 2:
        return ""
    rows = [
        [
            name,
            *(
                f"{method['categories'][each]['beta']:.2f} / {method['categories'][each]['gamma']:.2f}"
                for each in names
            ),
        ]
        for name, method in cell["methods"].items()
        if name != PLAIN
    ]
    return markdown_table(("β / γ by category", *names), rows) if rows else ""


def _differences(cell: dict[str, Any]) -> str:
    lines = []
    for name, method in cell["methods"].items():
        differences = [] if method["equality"]["exact"] is None else method["equality"]["differences"]
        # The worst first, because only MAX_LISTED are shown.
        differences = sorted(differences, key=lambda each: (each["is_near_tie"], -(each["steps"] or math.inf)))
        for each in differences[:MAX_LISTED]:
            kind = "near-tie" if each["is_near_tie"] else "**different**"
            lines.append(
                f"* {name}: prompt {cell['prompt_names'][each['prompt']]}, token {each['position']}, "
                f"gap {_number(each['gap'], 3)} ({_number(each['steps'], 1)} steps), {kind}"
            )
        if len(differences) > MAX_LISTED:
            lines.append(f"* {name}: {len(differences) - MAX_LISTED} more in results.json")
    return "\n".join(("Answers that differ from plain vLLM's:", "", *lines)) if lines else ""


def to_terminal(results: dict[str, Any]) -> Table:
    same = ("equal", "near-tie", "different")
    table = Table("cell", "method", "tokens/s", "× plain", "interval", "β", *same, "exact")
    for cell in results["cells"]:
        title = f"{cell['prompts']}, batch {cell['batch_size']}, {Sampling(**cell['sampling'])}"
        for name, method in cell["methods"].items():
            row = dict(zip(COLUMNS, _row(name, method)))
            exact = row["exact"].replace("**", "")
            table.add_row(title, name, row["tokens/s"], row["× plain"], row[COLUMNS[3]], row["β"],
                          *(row[column] for column in same), exact)  # fmt: skip
        for name in cell["errors"]:
            table.add_row(title, name, "not measured")
    return table


Cells = list[dict[str, Any]]


def draw(results: dict[str, Any], output: Path) -> list[str]:
    """Draw the figures into `output` and return their file names. Rows are prompt sets, columns are samplings."""
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
        # Shifted sideways, so that intervals do not hide each other.
        batches = [cell["batch_size"] * 1.03**number for cell in measured]
        below = [ratio["mean"] - ratio["low"] for ratio in ratios]
        above = [ratio["high"] - ratio["mean"] for ratio in ratios]
        means = [ratio["mean"] for ratio in ratios]
        axes.errorbar(batches, means, yerr=(below, above), marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    # A logarithmic axis, on which twice as fast and half as fast are equally far from plain.
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
    """Draws the smallest batch only, because acceptance hardly depends on the batch size."""
    from matplotlib.ticker import MaxNLocator

    cell = min(cells, key=lambda each: int(each["batch_size"]))
    for name, method in cell["methods"].items():
        rates = method["acceptance_by_depth"]
        if rates:
            axes.plot(range(1, len(rates) + 1), rates, marker=".", label=f"{name}, batch {cell['batch_size']}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="depth", ylabel="share accepted, of those accepted above", ylim=(0, 1.02))
