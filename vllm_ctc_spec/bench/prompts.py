"""The prompts of a benchmark's cells, the same for every method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.bench.config import PromptSource
from vllm_ctc_spec.training.prompts import Question, read_questions, turn_prompt
from vllm_ctc_spec.training.sources import Line, read_dataset, read_lines


@dataclass(frozen=True)
class Prompt:
    name: str
    """The question's, with the number of its turn where it has several."""
    category: str
    token_ids: tuple[int, ...]


def select_questions(name: str, source: PromptSource, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The rows that `source` selects, see `read_questions`. Raises ValueError that names the line."""
    lines = list(_lines(source))
    stop = None if source.limit is None else source.skip + source.limit
    chosen = lines[-source.last :] if source.last is not None else lines[source.skip : stop]
    if not chosen:
        raise ValueError(f"prompts.{name}: none of its {len(lines)} rows is selected. Change skip, limit or last.")
    return read_questions(chosen, tokenizer, prefix=source.prefix)


def _lines(source: PromptSource) -> Iterator[Line]:
    if source.subset is None and source.split is None:
        return read_lines(source.source)
    return read_dataset(source.source, source.split or "test", source.subset)


def num_turns(questions: Sequence[Question]) -> int:
    return max(1 + len(question.later_turns) for question in questions)


def next_turn(
    name: str, question: Question, answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Prompt | None:
    """The prompt of turn len(answers) + 1 after plain vLLM's `answers` (token ids); None where there is none.

    name: of the source, the category of a question without one.
    """
    token_ids = turn_prompt(question, answers, tokenizer)
    if token_ids is None:
        return None
    turn = f"{question.name}, turn {len(answers) + 1}" if question.later_turns else question.name
    return Prompt(turn, question.category or name, token_ids)


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of them, evenly, so that every category has its share."""
    return [prompts[index * len(prompts) // count] for index in range(count)]
