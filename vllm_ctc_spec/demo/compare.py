"""Asks both engines the demo's questions, and compares speed, acceptance length and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.bench.equality import Difference, judge
from vllm_ctc_spec.bench.records import Pass, Request, Workload
from vllm_ctc_spec.demo.engines import CTC, NAMES, PLAIN, Engines
from vllm_ctc_spec.training.prompts import Question, read_questions, turn_prompt
from vllm_ctc_spec.training.sources import read_lines

QUESTIONS = Path(__file__).with_name("questions.jsonl")
MAX_TOKENS = 96
"""Most tokens of an answer."""
PROOF_TOKENS = 64
"""The same in float32."""
PROOF_QUESTIONS = (0, 4, 6)
"""Indices of turns of different kinds that are also answered in float32."""

TextMatch = Literal["equal", "near_tie", "different"]


@dataclass(frozen=True)
class AnsweredTurn:
    """One turn of a question with both engines' answers."""

    question: str
    category: str
    prompt: tuple[int, ...]
    """Token ids."""
    requests: dict[str, Request]
    """By engine."""


@dataclass(frozen=True)
class Row:
    """One turn in the table and in the JSON."""

    question: str
    category: str
    tokens: dict[str, int]
    """Generated tokens, by engine."""
    tokens_per_second: dict[str, float]
    """By engine, prefill included."""
    speedup: float
    """tokens_per_second of ctc / plain."""
    acceptance_length: float | None
    """vLLM's definition: 1 + accepted tokens / steps with a draft; None if nothing was drafted."""
    text: TextMatch
    differs_at: int | None
    """Index of the first token that differs, from 0."""


@dataclass(frozen=True)
class Comparison:
    """All turns, for the table and the JSON."""

    dtype: str
    texts: dict[TextMatch, int]
    """Number of turns by result."""
    acceptance_length: float | None
    tokens_per_second: dict[str, float]
    """By engine, all tokens / total time of all answers."""
    speedup: float
    """tokens_per_second of ctc / plain."""
    rows: tuple[Row, ...]


def read_demo_questions(tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    return read_questions(read_lines(QUESTIONS), tokenizer)


def ask_in_turns(
    engines: Engines, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> Iterator[AnsweredTurn]:
    """Yield every turn of every question with both engines' greedy answers. Later turns follow plain vLLM's answers."""
    number = 0
    for question in questions:
        answers: list[tuple[int, ...]] = []
        while (prompt := turn_prompt(question, answers, tokenizer)) is not None:
            # Earlier work may slow down the first of the two, so the order alternates.
            order = NAMES if number % 2 == 0 else NAMES[::-1]
            work = workload([prompt], MAX_TOKENS)
            requests = {name: engines.one(name, "run", workload=work).requests[0] for name in order}
            turn = f", turn {len(answers) + 1}" if question.later_turns else ""
            yield AnsweredTurn(question.name + turn, str(question.category), prompt, requests)
            answers.append(requests[PLAIN].token_ids)
            number += 1


def workload(prompts: Sequence[tuple[int, ...]], max_tokens: int) -> Workload:
    return Workload(tuple(prompts), (max_tokens,) * len(prompts), temperature=0.0, seed=0, batch_size=1)


def same_in_float32(engines: Engines, answered: Sequence[AnsweredTurn]) -> bool:
    """Whether both engines generate the same tokens, one prompt at a time. Both engines run at the same time."""
    work = {"workload": workload([each.prompt for each in answered], PROOF_TOKENS)}
    passes: dict[str, Pass] = engines.both("run", dict.fromkeys(NAMES, work))
    plain, ctc = ([request.token_ids for request in passes[name].requests] for name in NAMES)
    return plain == ctc


def compare(engines: Engines, answered: Sequence[AnsweredTurn], dtype: torch.dtype) -> Comparison:
    """Compare the answers; asks plain vLLM for the logits where two texts first differ. dtype: of both engines."""
    equality = judge(
        [each.prompt for each in answered],
        [each.requests[PLAIN].token_ids for each in answered],
        [[each.requests[CTC].token_ids for each in answered]],
        dtype,
        lambda branchings: engines.one(PLAIN, "gaps", branchings=branchings),
        is_promised=True,
    )
    differences = {difference.prompt: difference for difference in equality.differences}
    speeds = {name: speed([each.requests[name] for each in answered]) for name in NAMES}
    return Comparison(
        dtype=str(dtype).removeprefix("torch."),
        texts={"equal": equality.equal, "near_tie": equality.near_tie, "different": equality.different},
        acceptance_length=acceptance_length([each.requests[CTC] for each in answered]),
        tokens_per_second=speeds,
        speedup=speeds[CTC] / speeds[PLAIN],
        rows=tuple(_row(each, differences.get(number)) for number, each in enumerate(answered)),
    )


def _row(answered: AnsweredTurn, difference: Difference | None) -> Row:
    speeds = {name: speed([answered.requests[name]]) for name in NAMES}
    text: TextMatch = "equal"
    if difference is not None:
        text = "near_tie" if difference.is_near_tie else "different"
    return Row(
        question=answered.question,
        category=answered.category,
        tokens={name: len(answered.requests[name].token_ids) for name in NAMES},
        tokens_per_second=speeds,
        speedup=speeds[CTC] / speeds[PLAIN],
        acceptance_length=acceptance_length([answered.requests[CTC]]),
        text=text,
        differs_at=None if difference is None else difference.position,
    )


def speed(requests: Sequence[Request]) -> float:
    """Tokens per second of requests that ran one at a time."""
    return sum(len(request.token_ids) for request in requests) / sum(request.total_time for request in requests)


def acceptance_length(requests: Sequence[Request]) -> float | None:
    drafts = [request.drafts for request in requests if request.drafts is not None]
    steps = sum(sum(each.steps_by_accepted) for each in drafts)
    accepted = sum(number * count for each in drafts for number, count in enumerate(each.steps_by_accepted))
    return 1 + accepted / steps if steps else None
