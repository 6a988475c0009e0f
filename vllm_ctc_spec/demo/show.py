"""Prints the demo's results: table, answer, tree, conclusion, next commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_ctc_spec.demo.compare import MAX_TOKENS, AnsweredTurn, Comparison, Row
from vllm_ctc_spec.demo.engines import CTC, PLAIN
from vllm_ctc_spec.demo.pair import Pair
from vllm_ctc_spec.inspection import DrawnTree, summary, to_terminal


def table(console: Console, comparison: Comparison, num_nodes: int) -> None:
    console.print(
        f"\nOne request at a time, greedy, {comparison.dtype}, compiled, node budget {num_nodes}:", highlight=False
    )
    shown = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    shown.add_column("question")
    for column in ("plain\ntokens/s", "CTC\ntokens/s", "\nratio", "acceptance\nlength"):
        shown.add_column(column, justify="right")
    shown.add_column("\ntext")
    for row in comparison.rows:
        shown.add_row(row.question, *_figures(row), _text_match(row))
    shown.add_section()
    shown.add_row("all", *_figures(comparison), f"{comparison.texts['equal']} of {len(comparison.rows)} equal")
    console.print(shown)


def _figures(result: Row | Comparison) -> tuple[str, ...]:
    speeds = result.tokens_per_second
    length = "-" if result.acceptance_length is None else f"{result.acceptance_length:.2f}"
    return f"{speeds[PLAIN]:.1f}", f"{speeds[CTC]:.1f}", f"{result.speedup:.2f}", length


def _text_match(row: Row) -> Text:
    if row.text == "equal":
        return Text("equal", "green")
    if row.text == "near_tie":
        return Text(f"near-tie at {row.differs_at}", "yellow")
    return Text(f"differs at {row.differs_at}", "red")


def answer(console: Console, answered: AnsweredTurn, tokenizer: Any) -> None:
    tokens = answered.requests[CTC].token_ids
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    console.print(f"\nThe answer of vLLM with CTC trees to {answered.question!r}:", markup=False, highlight=False)
    console.print(Padding(Text(text + " ..." * (len(tokens) == MAX_TOKENS)), (1, 2), expand=False))


def tree(console: Console, drawn: DrawnTree) -> None:
    console.print("Numbers are prefix probabilities; accepted tokens are green:", highlight=False)
    console.print(to_terminal(drawn))
    console.print(summary(drawn), highlight=False)


def conclusion(console: Console, comparison: Comparison, identical: bool, num_proved: int) -> None:
    def say(line: str) -> None:
        console.print(line, highlight=False)

    texts = comparison.texts
    say("")
    if comparison.dtype != "float32":
        say(
            f"{comparison.dtype}: {texts['equal']} of {len(comparison.rows)} texts are plain vLLM's. "
            f"{texts['near_tie']} differ from a near-tie on: two tokens with such close logits that rounding decides, "
            f"as in plain vLLM between batch sizes. {texts['different']} differ otherwise."
        )
    if identical:
        say(f"float32: [green]the same tokens[/] in all of {num_proved} answers.")
    else:
        say(f"float32: [red]different tokens[/] in {num_proved} answers. This is a bug; please report it.")
    say(f"[bold]{comparison.speedup:.2f} x[/] as many tokens per second as plain vLLM.")


def next_steps(console: Console, pair: Pair, num_nodes: int) -> None:
    binaries = Path(sys.executable).parent
    if binaries.is_relative_to(Path.cwd()):
        binaries = binaries.relative_to(Path.cwd())
    for title, command in (
        ("Serve it", f"vllm serve {pair.target} --spec-model {pair.drafter} --spec-tokens {num_nodes}"),
        ("Chat with it", f"vllm-ctc-spec chat {pair.target} {pair.drafter} --nodes {num_nodes}"),
    ):
        console.print(f"\n{title}:\n  {binaries}/{command}", markup=False, highlight=False, soft_wrap=True)
