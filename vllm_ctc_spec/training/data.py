"""JSONL files -> rows of token ids -> padded batches with sampled anchors.

Letters: B rows, L tokens, M anchors per row, U labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

ROW_KINDS = "'messages', 'text', or 'prompt_token_ids' with 'token_ids'"
PROMPT_KINDS = "'messages', 'prompt' or 'prompt_token_ids'"


@dataclass(frozen=True)
class TrainingRow:
    token_ids: Tensor
    """[L] int64"""
    trained: Tensor
    """[L] bool, tokens that the drafter learns to predict; the rest is context only."""

    def usable_anchors(self, label_length: int) -> Tensor:
        """Positions a >= 1 such that a and the U tokens after it are trained."""
        if len(self.trained) <= label_length + 1:
            return torch.empty(0, dtype=torch.int64)
        return 1 + self.trained[1:].unfold(0, label_length + 1, 1).all(1).nonzero()[:, 0]


class RowDataset(Dataset[TrainingRow]):
    """Rows that have at least one usable anchor."""

    def __init__(self, rows: Sequence[TrainingRow], label_length: int) -> None:
        self._rows = [row for row in rows if len(row.usable_anchors(label_length))]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TrainingRow:
        return self._rows[index]


@dataclass(frozen=True)
class AnchorCollator:
    """Pads rows on the right and draws anchors without replacement."""

    anchors_per_row: int
    label_length: int

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
        """input_ids [B, L], anchors [B, M] (positions), valid [B, M] bool, labels [B, M, U]."""
        length = max(len(row.token_ids) for row in rows)
        input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
        anchors = torch.ones(len(rows), self.anchors_per_row, dtype=torch.int64)
        valid = torch.zeros(len(rows), self.anchors_per_row, dtype=torch.bool)
        for i, row in enumerate(rows):
            input_ids[i, : len(row.token_ids)] = row.token_ids
            usable = row.usable_anchors(self.label_length)
            drawn = usable[torch.randperm(len(usable))[: self.anchors_per_row]]
            anchors[i, : len(drawn)] = drawn
            valid[i, : len(drawn)] = True
        label_positions = anchors[..., None] + torch.arange(1, self.label_length + 1)
        labels = input_ids.gather(1, label_positions.flatten(1)).view_as(label_positions)
        return {"input_ids": input_ids, "anchors": anchors, "valid": valid, "labels": labels}


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[TrainingRow]:
    """Read training rows; a row of more than `max_length` tokens is cut into consecutive windows.

    A line holds `messages` (only assistant turns are trained), `text`, or a regenerated row with
    `prompt_token_ids` and `token_ids` (only the latter are trained).
    """
    rows: list[TrainingRow] = []
    for fields, fail in _read_lines(path):
        token_ids, trained = _encode_row(fields, tokenizer, fail)
        rows += map(TrainingRow, torch.tensor(token_ids).split(max_length), torch.tensor(trained).split(max_length))
    return rows


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts in a file of `prompt`, `prompt_token_ids` or `messages` lines.

    Of `messages` the prompt is everything before the last assistant turn.
    """
    prompts = []
    for fields, fail in _read_lines(path):
        if "prompt_token_ids" in fields:
            prompts.append(_token_ids(fields, "prompt_token_ids", fail))
        elif "prompt" in fields:
            prompts.append(tokenizer(_string(fields, "prompt", fail))["input_ids"])
        elif "messages" in fields:
            messages = _messages(fields, fail)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            prompts.append(_encode(_render(messages, tokenizer, True, fail), tokenizer)["input_ids"])
        else:
            raise fail(f"needs {PROMPT_KINDS}, has {sorted(fields)}")
    return prompts


Fail = Callable[[str], ValueError]


def _read_lines(path: Path) -> Iterator[tuple[dict[str, Any], Fail]]:
    """Yield each line's JSON object and a maker of errors that name the file and the line."""
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"data file {str(path)!r} cannot be read ({error.strerror}).") from error
    with file:
        for number, line in enumerate(file, start=1):

            def fail(problem: str, number: int = number) -> ValueError:
                return ValueError(f"{path}, line {number}: {problem}.")

            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise fail(f"is not JSON ({error})") from error
            if not isinstance(fields, dict):
                raise fail(f"is {type(fields).__name__}, not a JSON object")
            yield fields, fail


def _encode_row(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, fail: Fail) -> tuple[list[int], list[bool]]:
    if "token_ids" in fields:
        prompt, continuation = (_token_ids(fields, key, fail) for key in ("prompt_token_ids", "token_ids"))
        return prompt + continuation, [False] * len(prompt) + [True] * len(continuation)
    if "messages" in fields:
        return _encode_messages(_messages(fields, fail), tokenizer, fail)
    if "text" in fields:
        token_ids = tokenizer(_string(fields, "text", fail))["input_ids"]
        return token_ids, [True] * len(token_ids)
    raise fail(f"needs {ROW_KINDS}, has {sorted(fields)}")


def _encode_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, fail: Fail
) -> tuple[list[int], list[bool]]:
    """Render once, and find each assistant turn as what it adds to the rendering of the turns before it."""
    text = _render(messages, tokenizer, False, fail)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer, True, fail)
        until = _render(messages[: turn + 1], tokenizer, False, fail)
        if not (text.startswith(until) and until.startswith(before)):
            raise fail(
                f"message {turn} is rendered differently once others follow it, so its tokens cannot be told apart; "
                "split the conversation so that this turn is its last, or use regenerated rows"
            )
        spans.append((len(before), len(until)))
    encoded = _encode(text, tokenizer, return_offsets_mapping=True)
    trained = [any(start <= begin and end <= stop for start, stop in spans) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], trained


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    # The chat template has written the special tokens already.
    return tokenizer(text, add_special_tokens=False, **options)


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, generate: bool, fail: Fail) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # Templates raise what they like: jinja's errors, ValueError, TypeError.
        raise fail(f"the tokenizer's chat template refuses the messages ({error})") from error


def _messages(fields: dict[str, Any], fail: Fail) -> list[dict[str, Any]]:
    messages = fields["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    ):
        raise fail("'messages' must be a list of objects with 'role' and 'content'")
    return list(messages)


def _string(fields: dict[str, Any], key: str, fail: Fail) -> str:
    if not isinstance(fields[key], str):
        raise fail(f"{key!r} must be a string, is {type(fields[key]).__name__}")
    return fields[key]


def _token_ids(fields: dict[str, Any], key: str, fail: Fail) -> list[int]:
    value = fields.get(key)
    if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
        raise fail(f"{key!r} must be a list of token ids")
    return value
