"""results.json for people: report.md, and one table for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from rich.table import Table

from vllm_ctc_spec.bench.clock import STAGES
from vllm_ctc_spec.bench.config import PLAIN
from vllm_ctc_spec.bench.equality import NEAR_TIE_STEPS
from vllm_ctc_spec.bench.ratio import CONFIDENCE
from vllm_ctc_spec.bench.sampling import Sampling
from vllm_ctc_spec.tables import markdown_table

MAX_LISTED = 20
"""Answers of one method in one cell that the report lists."""

MAX_ERROR = 300
"""Characters of an error that the report shows."""

COLUMNS = (
    "method", "tokens/s", "× plain", f"{CONFIDENCE:.0%} interval", "β", "γ", "accepted length", "nodes/step",
    "first token, ms", "per token, ms", "memory, MiB", "equal", "near-tie", "different", "exact",
)  # fmt: skip

LEGEND = """\
Engines of all methods are alive at once and all but one are stopped (SIGSTOP). In every round each method runs all
prompts of the cell once, in the order of the table; a first, unmeasured round warms up. "Batch b" means b requests in
flight: when one ends, the next is added.

* **tokens/s**: generated tokens over wall time, median over rounds, prefill included.
* **× plain**: tokens/s over plain vLLM's in the same round, geometric mean over rounds, with Student's t interval on
  its logarithm.
* **β**: generated tokens per decoding step, the prefill and its token apart; steps without a draft count. **γ**: mean
  time per token of plain vLLM over the method's, each request by its own clock. (arXiv 2412.00061, equations 12, 13.)
* **accepted length**: vLLM's definition, 1 + accepted / steps that had a draft; **nodes/step**: draft tokens of these.
* **first token**, **per token**: medians over requests. **memory**: peak resident size of the method's processes (pages
  that they share count in each), on a GPU torch's peak.
* **equal / near-tie / different**: prompts, by the worst of their answers in all rounds, against plain vLLM's
  warm-up answers; plain's own row says how repeatable plain vLLM is. {rule}
* **exact**: nothing is different. A dash where it is not promised: for sampled text in 16 bits, and for vLLM's own
  methods, whose rejection sampling draws other random numbers than plain sampling does from the same seed."""

FLOAT32 = "In float32 every token must be the same."
NEAR_TIE = (
    "Greedy text may leave plain vLLM's at a near-tie: the worse of the two tokens' logits is at most "
    f"{NEAR_TIE_STEPS} steps of {{dtypes}} below the target's best (asked of plain vLLM). A step is the distance of "
    "neighbouring numbers of that type at the best logit: in bfloat16 0.125 from 16 to 32, and 0.25 from 32 to 64."
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
    # Whole in results.json; pydantic's go on for pages.
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
    columns = ("accepted at depth, of those one above", *map(str, range(1, deepest + 1)))
    return markdown_table(columns, rows) if rows else ""


def _stages(cell: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{method['stages_ms'][stage]:.2f}" for stage in STAGES)]
        for name, method in cell["methods"].items()
        if method["stages_ms"]
    ]
    return markdown_table(("ms per step, median, in a pass of its own", *STAGES), rows) if rows else ""


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
        # The worst first, for those that are not listed.
        differences = sorted(differences, key=lambda each: (each["is_near_tie"], -(each["steps"] or math.inf)))
        for each in differences[:MAX_LISTED]:
            kind = "near-tie" if each["is_near_tie"] else "**different**"
            lines.append(
                f"* {name}: prompt {cell['prompt_names'][each['prompt']]}, token {each['position']}, "
                f"gap {_number(each['gap'], 3)} ({_number(each['steps'], 1)} steps), {kind}"
            )
        if len(differences) > MAX_LISTED:
            lines.append(f"* {name}: {len(differences) - MAX_LISTED} more in results.json")
    return "\n".join(("Where answers leave plain vLLM's:", "", *lines)) if lines else ""


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
