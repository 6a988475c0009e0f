"""Reads prompts of the usual layouts as token ids, for training and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.training.sources import (
    ANY_VOCAB_SIZE,
    ChatTemplate,
    FaultyLine,
    Line,
    checked_token_ids,
    encode,
    messages_of,
    parse_lines,
    read_lines,
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
    """Messages of the first prompt, for lines of `turns` and `question`."""
    later_turns: tuple[str, ...] = ()


def read_questions(
    lines: Iterable[Line],
    tokenizer: PreTrainedTokenizerBase,
    skipped: list[str] | None = None,
    *,
    vocab_size: int = ANY_VOCAB_SIZE,
    prefix: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Question]:
    """The prompts of `lines` (from `read_lines`).

    Each line holds one of these keys; if it has several, the first one in this order is read:

    * `turns`, a list of user messages (MT-bench, Spec-Bench), or `question`, one user message (GSM8K). They go through
      the chat template; a tokenizer without one gets them as lines of text.
    * `messages`, or ShareGPT's `conversations`: the prompt ends before the last assistant message.
    * `prompt_token_ids`.
    * `prompt` or `text`, without the chat template.

    `prefix` is put before the first turn, question, prompt or text. chat_template_kwargs: further variables of the chat
    template. Token ids must be below `vocab_size`.

    Raises ValueError at the first faulty line; with `skipped`, appends a description of it there and goes on. Always
    raises ValueError if messages need a chat template that the tokenizer lacks.
    """

    template = ChatTemplate(tokenizer, chat_template_kwargs)

    def parse(line: Line) -> Question:
        fields = line.fields()
        messages, later_turns = _turns(fields, prefix)
        token_ids = _encode_turns(messages, template) if messages else _encode_prompt(fields, template, prefix)
        return Question(
            name=str(fields.get("question_id", line.where.rpartition(" ")[2])),
            category=str(fields["category"]) if "category" in fields else None,
            first=tuple(checked_token_ids(token_ids, vocab_size)),
            messages=messages,
            later_turns=later_turns,
        )

    return list(parse_lines(lines, parse, skipped))


def read_prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    skipped: list[str] | None = None,
    *,
    vocab_size: int = ANY_VOCAB_SIZE,
) -> list[list[int]]:
    """Token ids of the first prompt of each line; see `read_questions`."""
    questions = read_questions(read_lines(source), tokenizer, skipped, vocab_size=vocab_size)
    return [list(question.first) for question in questions]


def turn_prompt(
    question: Question,
    answers: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...] | None:
    """Token ids of the prompt of turn len(answers) + 1; None if there is no such turn.

    answers: token ids of the answers to the turns before it.
    """
    if not answers:
        return question.first
    if len(answers) > len(question.later_turns):
        return None
    messages = list(question.messages)
    for answer, text in zip(answers, question.later_turns):
        written = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        messages += [{"role": "assistant", "content": written}, {"role": "user", "content": text}]
    try:
        return tuple(_encode_turns(messages, ChatTemplate(tokenizer, chat_template_kwargs)))
    except FaultyLine as error:
        raise ValueError(f"question {question.name}, turn {len(answers) + 1}: {error}.") from error


def _turns(fields: dict[str, Any], prefix: str) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """The first turn as a message, and the later turns; both empty if the line has neither `turns` nor `question`."""
    if "turns" not in fields and "question" not in fields:
        return (), ()
    turns = fields["turns"] if "turns" in fields else [string_of(fields, "question")]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise FaultyLine("'turns' must be a list of texts that are not empty")
    return ({"role": "user", "content": prefix + turns[0]},), tuple(turns[1:])


def _encode_turns(messages: Sequence[dict[str, Any]], template: ChatTemplate) -> list[int]:
    if not template.is_there:
        text = "\n".join(message["content"] for message in messages) + "\n"
        return list(encode(text, template.tokenizer)["input_ids"])
    return _encode_messages(messages, template)


def _encode_messages(messages: Sequence[dict[str, Any]], template: ChatTemplate) -> list[int]:
    text = template.render(messages, add_generation_prompt=True)
    # The chat template has written the special tokens already.
    return list(encode(text, template.tokenizer, add_special_tokens=False)["input_ids"])


def _encode_prompt(fields: dict[str, Any], template: ChatTemplate, prefix: str) -> list[int]:
    if "messages" in fields or "conversations" in fields:
        messages = messages_of(fields)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise FaultyLine("has no message before the last assistant turn")
        return _encode_messages(messages, template)
    if "prompt_token_ids" in fields:
        return token_ids_of(fields, "prompt_token_ids")
    for key in ("prompt", "text"):
        if key in fields:
            return list(encode(prefix + string_of(fields, key), template.tokenizer)["input_ids"])
    raise FaultyLine(f"needs {PROMPT_KINDS}, has {sorted(fields)}")
