"""Questions of the usual benchmarks as token ids, the same for every method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.bench.config import PromptSource
from vllm_ctc_spec.training.sources import FaultyLine, Line, read_dataset, read_lines

KINDS = "'turns', 'question', 'prompt', 'text', 'messages' or 'prompt_token_ids'"


@dataclass(frozen=True)
class Question:
    """One row of a source."""

    name: str
    category: str
    first: tuple[int, ...]
    """Token ids of the first prompt."""
    messages: tuple[dict[str, Any], ...] = ()
    """What `first` says, where more turns follow."""
    later_turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    name: str
    """The question's, with the number of its turn where it has several."""
    category: str
    token_ids: tuple[int, ...]


def read_questions(name: str, source: PromptSource, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The rows that `source` selects.

    A row holds `turns` (MT-bench and Spec-Bench: question_id, category, turns), `question` (GSM8K), `prompt` or
    `text` (continued as they are), `messages`, or `prompt_token_ids`. Turns, questions and messages go through the
    tokenizer's chat template, where it has one. Raises ValueError that names the line.
    """
    lines = list(_lines(source))
    stop = None if source.limit is None else source.skip + source.limit
    chosen = lines[-source.last :] if source.last is not None else lines[source.skip : stop]
    if not chosen:
        raise ValueError(f"prompts.{name}: none of its {len(lines)} rows is selected. Change skip, limit or last.")
    questions = []
    for line in chosen:
        try:
            fields = line.fields()
            questions.append(_question(fields, str(fields.get("category", name)), line, source.prefix, tokenizer))
        except FaultyLine as error:
            raise ValueError(f"{line.where}: {error}.") from error
    return questions


def _lines(source: PromptSource) -> Iterator[Line]:
    if source.subset is None and source.split is None:
        return read_lines(source.source)
    return read_dataset(source.source, source.split or "test", source.subset)


def _question(
    fields: dict[str, Any], category: str, line: Line, prefix: str, tokenizer: PreTrainedTokenizerBase
) -> Question:
    name = str(fields.get("question_id", line.where.rpartition(" ")[2]))
    turns = [fields["question"]] if "question" in fields and "turns" not in fields else fields.get("turns")
    if turns is not None:
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise FaultyLine("'turns' must be a list of texts, and 'question' a text")
        messages = ({"role": "user", "content": prefix + turns[0]},)
        return Question(name, category, _render(messages, tokenizer), messages, tuple(turns[1:]))
    if "messages" in fields:
        return Question(name, category, _render(_until_answer(fields["messages"]), tokenizer))
    if "prompt_token_ids" in fields:
        return Question(name, category, tuple(fields["prompt_token_ids"]))
    text = fields.get("prompt", fields.get("text"))
    if not isinstance(text, str) or not text:
        raise FaultyLine(f"needs {KINDS}, has {sorted(fields)}")
    return Question(name, category, tuple(tokenizer(prefix + text)["input_ids"]))


def _until_answer(messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not all(isinstance(each, dict) and "role" in each for each in messages):
        raise FaultyLine("'messages' must be a list of objects with 'role' and 'content'")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise FaultyLine("has no message before the last assistant turn")
    return tuple(messages)


def _render(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if tokenizer.chat_template is None:
        return tuple(tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"])
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Templates raise what they like: jinja's errors, ValueError, TypeError.
        raise FaultyLine(f"the tokenizer's chat template refuses the messages ({error})") from error
    # The chat template has written the special tokens already.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def num_turns(questions: Sequence[Question]) -> int:
    return max(1 + len(question.later_turns) for question in questions)


def next_turn(
    question: Question, answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Prompt | None:
    """The prompt of turn len(answers) + 1 after plain vLLM's `answers` (token ids); None where there is none."""
    turn = len(answers)
    several = f"{question.name}, turn {turn + 1}" if question.later_turns else question.name
    if turn == 0:
        return Prompt(several, question.category, question.first)
    if turn > len(question.later_turns):
        return None
    messages = list(question.messages)
    for answer, text in zip(answers, question.later_turns):
        written = tokenizer.decode(answer, skip_special_tokens=True).strip()
        messages += [{"role": "assistant", "content": written}, {"role": "user", "content": text}]
    return Prompt(several, question.category, _render(messages, tokenizer))


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of them, evenly, so that every category has its share."""
    return [prompts[index * len(prompts) // count] for index in range(count)]
