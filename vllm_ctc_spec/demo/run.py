"""The demo: starts both engines, asks the questions, draws a tree, and compares again in float32."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.demo import show
from vllm_ctc_spec.demo.compare import (
    PROOF_QUESTIONS,
    AnsweredTurn,
    Comparison,
    ask_in_turns,
    compare,
    read_demo_questions,
    same_in_float32,
    workload,
)
from vllm_ctc_spec.demo.engines import CTC, NAMES, Engines, options_of_both
from vllm_ctc_spec.demo.pair import Pair, Report
from vllm_ctc_spec.files import user_cache
from vllm_ctc_spec.inspection import DrawnTree, draw
from vllm_ctc_spec.machine import target_dtype

CONTEXT = 1024
"""Largest `max_model_len`, in tokens. The longest prompt with its answer needs half of it."""

WARM_UP_TOKENS = 16
SHOWN_TURN = 5
"""Index of the turn whose answer is printed, with the tree of a step in the middle of it."""
TREE_NODES = 12
"""Node budget of that tree."""


class ProgressLines:
    """Prints lines of progress, each with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self._console, self._started = console, time.monotonic()

    def __call__(self, line: str) -> None:
        passed = time.monotonic() - self._started
        self._console.print(f"[{passed:3.0f} s] {line}", markup=False, highlight=False)


def run_demo(pair: Pair, num_nodes: int, console: Console, report: Report) -> dict[str, Any]:
    """Print the comparison, and return it as JSON values. Raises ValueError if an engine fails."""
    dtype = target_dtype()
    tokenizer = AutoTokenizer.from_pretrained(str(pair.target))
    logs = user_cache("demo-logs")
    report(
        "starting plain vLLM and vLLM with CTC trees, about two minutes where the target is not compiled yet "
        f"(logs: {logs})"
    )
    method: dict[str, Any] = {"num_speculative_tokens": num_nodes}
    with running_engines(pair, method, dtype, logs / "compiled") as engines:
        answered, comparison = answer_questions(engines, tokenizer, dtype, report)
    show.table(console, comparison, num_nodes)
    show.answer(console, answered[SHOWN_TURN], tokenizer)
    report("drawing the token tree of a step in the middle of this answer")
    show.tree(console, middle_tree(pair, answered[SHOWN_TURN]))
    if dtype == torch.float32:
        proved, identical = len(answered), comparison.texts["equal"] == len(answered)
    else:
        report(f"answering {len(PROOF_QUESTIONS)} of the questions in float32, with both engines")
        proof = [answered[index] for index in PROOF_QUESTIONS]
        # A fixed budget drafts a tree in every step. Eager, because compiling takes longer than generating few tokens.
        method["adaptive_budget"] = False
        with running_engines(pair, method, torch.float32, logs / "float32", enforce_eager=True) as engines:
            proved, identical = len(proof), same_in_float32(engines, proof)
    show.conclusion(console, comparison, identical, proved)
    show.next_steps(console, pair, num_nodes)
    return {
        "target": str(pair.target),
        "drafter": str(pair.drafter),
        "num_nodes": num_nodes,
        "identical": identical,
        **dataclasses.asdict(comparison),
    }


@contextmanager
def running_engines(
    pair: Pair, method: dict[str, Any], dtype: torch.dtype, logs: Path, **options: Any
) -> Iterator[Engines]:
    """Start plain vLLM and vLLM with CTC trees, and end them after the body. method, options: see `options_of_both`."""
    text = AutoConfig.from_pretrained(str(pair.target)).get_text_config()
    context = min(text.max_position_embeddings, CONTEXT)
    with Engines(logs) as engines:
        engines.start(str(pair.target), options_of_both(pair, method, dtype, context, **options))
        yield engines


def answer_questions(
    engines: Engines, tokenizer: Any, dtype: torch.dtype, report: Report
) -> tuple[list[AnsweredTurn], Comparison]:
    questions = read_demo_questions(tokenizer)
    # The first request compiles and measures, which must not count for a question.
    warm_up = {"workload": workload([questions[0].first], WARM_UP_TOKENS)}
    engines.both("run", dict.fromkeys(NAMES, warm_up))
    report(f"asking {len(questions)} questions, one engine at a time")
    answered = list(ask_in_turns(engines, questions, tokenizer))
    return answered, compare(engines, answered, dtype)


def middle_tree(pair: Pair, answered: AnsweredTurn) -> DrawnTree:
    tokens = answered.requests[CTC].token_ids
    text = [*answered.prompt, *tokens[: len(tokens) // 2]]
    # Without the progress bars of transformers.
    with redirect_stderr(io.StringIO()):
        return draw(str(pair.target), str(pair.drafter), text, TREE_NODES, SpecOptions())
