"""What the demo prints beside its stages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_ctc_spec.demo.compare import Answered, Comparison, Row
from vllm_ctc_spec.demo.engines import CTC, PLAIN
from vllm_ctc_spec.demo.pair import Pair
from vllm_ctc_spec.inspection import DrawnTree, summary, to_terminal


def table(console: Console, comparison: Comparison, num_nodes: int) -> None:
    console.print(to_table(comparison, num_nodes))


def to_table(comparison: Comparison, num_nodes: int) -> Table:
    title = f"one request at a time, greedy, {comparison.dtype}, compiled, up to {num_nodes} nodes a step"
    shown = Table(title=title, title_justify="left")
    shown.add_column("question")
    for column in ("plain, tokens/s", "CTC, tokens/s", "ratio", "acceptance length"):
        shown.add_column(column, justify="right")
    shown.add_column("text")
    for row in comparison.rows:
        shown.add_row(f"{row.category}: {row.question}", *_figures(row), _sameness(row))
    shown.add_section()
    texts = comparison.texts
    counts = f"{texts['equal']} equal, {texts['near_tie']} near-tie, {texts['different']} different"
    shown.add_row("all", *_figures(comparison), counts, style="bold")
    return shown


def _figures(of: Row | Comparison) -> tuple[str, ...]:
    speeds = of.tokens_per_second
    length = "-" if of.acceptance_length is None else f"{of.acceptance_length:.2f}"
    return f"{speeds[PLAIN]:.1f}", f"{speeds[CTC]:.1f}", f"{of.speedup:.2f}", length


def _sameness(row: Row) -> Text:
    if row.text == "equal":
        return Text("equal", "green")
    if row.text == "near_tie":
        return Text(f"parts at a near-tie, token {row.parts_at}", "yellow")
    return Text(f"differs, token {row.parts_at}", "red")


def answer(console: Console, answered: Answered, tokenizer: Any) -> None:
    text = tokenizer.decode(answered.requests[CTC].token_ids, skip_special_tokens=True)
    console.print(f"\n[bold]{answered.question}[/], the answer of vLLM with CTC trees:")
    console.print(Padding(Text(text.strip()), (0, 2)))
    console.print()


def tree(console: Console, drawn: DrawnTree) -> None:
    console.print("prefix probabilities; green: what the target took")
    console.print(to_terminal(drawn))
    console.print(summary(drawn))
    console.print()


def verdict(console: Console, comparison: Comparison, identical: bool, num_proved: int) -> None:
    texts = comparison.texts
    total = sum(texts.values())
    if comparison.dtype != "float32":
        console.print(
            f"{comparison.dtype}: {texts['equal']} of {total} texts are plain vLLM's, {texts['near_tie']} part where "
            "two tokens are so near that rounding decides, which sums in another order do to plain vLLM as well; "
            f"{texts['different']} differ otherwise.",
            highlight=False,
        )
    if identical:
        console.print(f"float32: [green]the same tokens[/] in {num_proved} of {num_proved} answers.", highlight=False)
    else:
        console.print(f"float32: [red]different tokens[/] in {num_proved} answers, which is a fault.", highlight=False)
    console.print(
        f"[bold]{comparison.speedup:.2f} x[/] as many tokens per second as plain vLLM on these questions.\n",
        highlight=False,
    )


def next_steps(console: Console, pair: Pair, num_nodes: int) -> None:
    binaries = Path(sys.executable).parent
    if binaries.is_relative_to(Path.cwd()):
        binaries = binaries.relative_to(Path.cwd())
    for title, command in (
        ("Serve it", f"vllm serve {pair.target} --spec-model {pair.drafter} --spec-tokens {num_nodes}"),
        ("Talk to it", f"vllm-ctc-spec chat {pair.target} {pair.drafter} --nodes {num_nodes}"),
    ):
        console.print(f"{title}:\n  {binaries}/{command}", markup=False, highlight=False, soft_wrap=True)
