"""Prompts of every usual layout as token ids, for training and benchmark alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.training.sources import (
    ANY_VOCAB_SIZE,
    FaultyLine,
    Line,
    checked,
    each_line,
    encode,
    has_chat_template,
    messages_of,
    read_lines,
    render,
    string_of,
    token_ids_of,
)

PROMPT_KINDS = "'turns', 'question', 'messages', 'conversations', 'prompt_token_ids', 'prompt' or 'text'"


@dataclass(frozen=True)
class Question:
    """The prompt of one line, and the user's later turns."""

    name: str
    """Its `question_id`, or the number of its line."""
    category: str | None
    first: tuple[int, ...]
    """Token ids of the first prompt."""
    messages: tuple[dict[str, Any], ...] = ()
    """What `first` says, where more turns follow."""
    later_turns: tuple[str, ...] = ()


def read_questions(
    lines: Iterable[Line],
    tokenizer: PreTrainedTokenizerBase,
    skipped: list[str] | None = None,
    *,
    vocab_size: int = ANY_VOCAB_SIZE,
    prefix: str = "",
) -> list[Question]:
    """The prompts of `lines` (see `read_lines`).

    A line holds `turns` (MT-bench, Spec-Bench), `question` (GSM8K), `messages` or ShareGPT's `conversations` (all
    before the last assistant turn), `prompt_token_ids`, or `prompt` or `text`, which are continued as they are; the
    first of these counts. Turns and questions go through the chat template, where the tokenizer has one, else they are
    lines of text. `prefix` stands before the first turn, question, prompt or text. Token ids are below `vocab_size`.

    Raises ValueError at the first faulty line, or describes it in `skipped`, if given, and leaves it out. A tokenizer
    without the chat template that messages need is always raised.
    """

    def read(line: Line) -> Question:
        fields = line.fields()
        messages, later_turns = _turns(fields, prefix)
        token_ids = _encode_chat(messages, tokenizer) if messages else _encode_prompt(fields, tokenizer, prefix)
        return Question(
            name=str(fields.get("question_id", line.where.rpartition(" ")[2])),
            category=str(fields["category"]) if "category" in fields else None,
            first=tuple(checked(token_ids, vocab_size)),
            messages=messages,
            later_turns=later_turns,
        )

    return list(each_line(lines, read, skipped))


def read_prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    skipped: list[str] | None = None,
    *,
    vocab_size: int = ANY_VOCAB_SIZE,
) -> list[list[int]]:
    """Token ids of the first turns alone; see `read_questions`."""
    questions = read_questions(read_lines(source), tokenizer, skipped, vocab_size=vocab_size)
    return [list(question.first) for question in questions]


def turn_prompt(
    question: Question, answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...] | None:
    """Token ids of the prompt of turn len(answers) + 1, after `answers` (token ids); None if there is no such turn."""
    if not answers:
        return question.first
    if len(answers) > len(question.later_turns):
        return None
    messages = list(question.messages)
    for answer, text in zip(answers, question.later_turns):
        written = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        messages += [{"role": "assistant", "content": written}, {"role": "user", "content": text}]
    try:
        return tuple(_encode_chat(messages, tokenizer))
    except FaultyLine as error:
        raise ValueError(f"question {question.name}, turn {len(answers) + 1}: {error}.") from error


def _turns(fields: dict[str, Any], prefix: str) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The first turn as a message, and the later ones; nothing where the line has another layout."""
    if "turns" not in fields and "question" not in fields:
        return (), ()
    turns = fields["turns"] if "turns" in fields else [string_of(fields, "question")]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise FaultyLine("'turns' must be a list of texts that are not empty")
    return ({"role": "user", "content": prefix + turns[0]},), tuple(turns[1:])


def _encode_chat(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not has_chat_template(tokenizer):
        return list(encode("\n".join(message["content"] for message in messages) + "\n", tokenizer)["input_ids"])
    # The chat template has written the special tokens already.
    return list(encode(render(messages, tokenizer, True), tokenizer, add_special_tokens=False)["input_ids"])


def _encode_prompt(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prefix: str) -> list[int]:
    if "messages" in fields or "conversations" in fields:
        messages = messages_of(fields)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise FaultyLine("has no message before the last assistant turn")
        return list(encode(render(messages, tokenizer, True), tokenizer, add_special_tokens=False)["input_ids"])
    if "prompt_token_ids" in fields:
        return token_ids_of(fields, "prompt_token_ids")
    for key in ("prompt", "text"):
        if key in fields:
            return list(encode(prefix + string_of(fields, key), tokenizer)["input_ids"])
    raise FaultyLine(f"needs {PROMPT_KINDS}, has {sorted(fields)}")
