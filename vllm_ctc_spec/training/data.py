"""Lines of a source -> rows of token ids -> padded batches with sampled anchors.

Letters: B rows, L tokens, M anchors per row, U labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.training.sources import FaultyLine, read_lines

ROW_KINDS = "'messages', 'conversations', 'text', or 'prompt_token_ids' with 'token_ids'"
PROMPT_KINDS = "'messages', 'conversations', 'prompt' or 'prompt_token_ids'"
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
ANY_VOCAB_SIZE = 2**31
FEWEST_FREQUENT, FREQUENT_SHARE = 2048, 4

Encoded = TypeVar("Encoded")


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


@dataclass(frozen=True)
class AnchoredRow:
    token_ids: Tensor
    """[L] int64"""
    anchors: Tensor
    """[<= M] int64, positions"""
    hidden: Tensor | None
    """[L, H], the target's last hidden states, where they are cached."""


class AnchorDataset(Dataset[AnchoredRow]):
    """Rows, each with at most M of its usable anchors.

    What is drawn depends on seed, epoch and row alone, so that a resumed run draws what an uninterrupted one does.
    hidden: row number -> [L, H], where the target's hidden states are cached.
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        label_length: int,
        anchors_per_row: int,
        seed: int = 0,
        hidden: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.epoch = 0
        self._rows, self._label_length, self._num_anchors = rows, label_length, anchors_per_row
        self._seed, self._hidden = seed, hidden

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> AnchoredRow:
        row = self._rows[index]
        usable = row.usable_anchors(self._label_length)
        drawn = np.random.default_rng((self._seed, self.epoch, index)).permutation(len(usable))[: self._num_anchors]
        hidden = None if self._hidden is None else self._hidden(index)
        return AnchoredRow(row.token_ids, usable[torch.from_numpy(drawn)], hidden)


@dataclass(frozen=True)
class AnchorCollator:
    """Pads rows on the right."""

    label_length: int

    def __call__(self, rows: Sequence[AnchoredRow]) -> dict[str, Tensor]:
        """input_ids [B, L], anchors [B, M] (positions), valid [B, M] bool, labels [B, M, U]; hidden [B, L, H]."""
        input_ids = pad_sequence([row.token_ids for row in rows], batch_first=True)
        anchors = pad_sequence([row.anchors for row in rows], batch_first=True)
        valid = anchors > 0
        anchors = anchors.clamp(min=1)
        positions = anchors[..., None] + torch.arange(1, self.label_length + 1)
        # Of padding, whose labels nobody reads, positions may lie behind the end.
        labels = input_ids.gather(1, positions.flatten(1).clamp(max=input_ids.shape[1] - 1)).view_as(positions)
        batch = {"input_ids": input_ids, "anchors": anchors, "valid": valid, "labels": labels}
        hidden = [row.hidden for row in rows if row.hidden is not None]
        return batch | ({"hidden": pad_sequence(hidden, batch_first=True)} if hidden else {})


def with_anchors(rows: Sequence[TrainingRow], label_length: int) -> list[TrainingRow]:
    """The rows that have at least one usable anchor."""
    return [row for row in rows if len(row.usable_anchors(label_length))]


def num_frequent(vocab_size: int) -> int | None:
    """How many tokens make up nearly all text, max(FEWEST_FREQUENT, V / FREQUENT_SHARE), if that is not all of them."""
    number = max(FEWEST_FREQUENT, vocab_size // FREQUENT_SHARE)
    return number if number < vocab_size else None


def most_frequent(rows: Sequence[TrainingRow], vocab_size: int, num_tokens: int) -> Tensor:
    """[num_tokens] int64, of the tokens that the drafter learns to predict."""
    trained = torch.cat([row.token_ids[row.trained] for row in rows])
    return torch.bincount(trained, minlength=vocab_size).topk(num_tokens).indices


def read_rows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    skipped: list[str] | None = None,
    *,
    vocab_size: int = ANY_VOCAB_SIZE,
    max_lines: int | None = None,
) -> list[TrainingRow]:
    """Read training rows; a row of more than `max_length` tokens is cut into consecutive windows.

    `source` is a file or a data set, see `read_lines`. A line holds `messages` or the ShareGPT layout `conversations`
    (only assistant turns are trained), `text`, or a regenerated row with `prompt_token_ids` and `token_ids` (only the
    latter are trained). Token ids are below `vocab_size`, the rows of the target's embedding.

    Raises ValueError at the first faulty line, or describes it in `skipped`, if given, and leaves it out. A source
    that cannot be read and a tokenizer without the chat template that messages need are always raised. `max_lines` is
    for a look at the first ones.
    """

    def encode(fields: dict[str, Any]) -> TrainingRow:
        token_ids, trained = _encode_row(fields, tokenizer)
        return TrainingRow(torch.tensor(_checked(token_ids, vocab_size)), torch.tensor(trained))

    rows: list[TrainingRow] = []
    for row in _encode_lines(source, encode, skipped, max_lines):
        rows += map(TrainingRow, row.token_ids.split(max_length), row.trained.split(max_length))
    return rows


def read_prompts(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    skipped: list[str] | None = None,
    *,
    vocab_size: int = ANY_VOCAB_SIZE,
) -> list[list[int]]:
    """Token ids of the prompts in lines of `prompt`, `prompt_token_ids`, `messages` or ShareGPT `conversations`.

    Of messages the prompt is everything before the last assistant turn. `source`, `skipped`, `vocab_size` and errors
    are those of `read_rows`.
    """

    def encode(fields: dict[str, Any]) -> list[int]:
        return _checked(_encode_prompt(fields, tokenizer), vocab_size)

    return list(_encode_lines(source, encode, skipped))


def _encode_lines(
    source: str | Path,
    encode: Callable[[dict[str, Any]], Encoded],
    skipped: list[str] | None,
    max_lines: int | None = None,
) -> Iterator[Encoded]:
    for line in islice(read_lines(source), max_lines):
        try:
            encoded = encode(line.fields())
        except FaultyLine as error:
            message = f"{line.where}: {error}."
            if skipped is None:
                raise ValueError(message) from error
            skipped.append(message)
        else:
            yield encoded


def _checked(token_ids: list[int], vocab_size: int) -> list[int]:
    if not token_ids:
        raise FaultyLine("has no tokens")
    for token in (min(token_ids), max(token_ids)):
        if not 0 <= token < vocab_size:
            raise FaultyLine(f"has token id {token}, must be from 0 to {vocab_size - 1}")
    return token_ids


def _encode_row(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    if "token_ids" in fields:
        prompt, continuation = (_token_ids(fields, key) for key in ("prompt_token_ids", "token_ids"))
        return prompt + continuation, [False] * len(prompt) + [True] * len(continuation)
    if "messages" in fields or "conversations" in fields:
        return _encode_messages(_messages(fields), tokenizer)
    if "text" in fields:
        token_ids = _encode(_string(fields, "text"), tokenizer)["input_ids"]
        return token_ids, [True] * len(token_ids)
    raise FaultyLine(f"needs {ROW_KINDS}, has {sorted(fields)}")


def _encode_prompt(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if "prompt_token_ids" in fields:
        return _token_ids(fields, "prompt_token_ids")
    if "prompt" in fields:
        return list(_encode(_string(fields, "prompt"), tokenizer)["input_ids"])
    if "messages" in fields or "conversations" in fields:
        messages = _messages(fields)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise FaultyLine("has no message before the last assistant turn")
        return list(_encode(_render(messages, tokenizer, True), tokenizer, add_special_tokens=False)["input_ids"])
    raise FaultyLine(f"needs {PROMPT_KINDS}, has {sorted(fields)}")


def _encode_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Render once, and find each assistant turn as what it adds to the rendering of the turns before it."""
    text = _render(messages, tokenizer, False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer, True)
        until = _render(messages[: turn + 1], tokenizer, False)
        if not (text.startswith(until) and until.startswith(before)):
            raise FaultyLine(
                f"message {turn} is rendered differently once others follow it, so its tokens cannot be told apart; "
                "split the conversation so that this turn is its last, or use regenerated rows"
            )
        spans.append((len(before), len(until)))
    # The chat template has written the special tokens already.
    encoded = _encode(text, tokenizer, add_special_tokens=False, return_offsets_mapping=True)
    trained = [any(start <= begin and end <= stop for start, stop in spans) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], trained


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes.
        raise FaultyLine(f"has text that is not Unicode ({error.reason})") from error
    return tokenizer(text, **options)


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, generate: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no default chat template, which 'messages' and "
            "'conversations' need. Put the model's chat_template.jinja into the tokenizer's folder (or set "
            "'chat_template' in its tokenizer_config.json), or give rows of 'text' and prompts of 'prompt'."
        ) from error
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=generate
            )
        )
    except Exception as error:  # Templates raise what they like: jinja's errors, ValueError, TypeError.
        raise FaultyLine(f"the tokenizer's chat template refuses the messages ({error})") from error


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of either layout, at least one."""
    sharegpt = "messages" not in fields
    key, role, content = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    messages = fields[key]
    if not isinstance(messages, list) or not all(_is_message(message, role, content) for message in messages):
        raise FaultyLine(f"{key!r} must be a list of objects with {role!r} and {content!r}")
    if not messages:
        raise FaultyLine(f"{key!r} is empty")
    if sharegpt:
        return [_from_sharegpt(message) for message in messages]
    # Data sets fill absent fields with None, and templates ask whether a field is there.
    return [{k: v for k, v in message.items() if v is not None or k == content} for message in messages]


def _is_message(message: Any, role: str, content: str) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get(role), str):
        return False
    # A turn that only calls tools says nothing; templates would print the None of any other.
    return isinstance(message.get(content), str | list) or bool(message.get("tool_calls"))


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    if message["from"] not in SHAREGPT_ROLES:
        raise FaultyLine(f"'conversations' has 'from' {message['from']!r}, must be one of {sorted(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[message["from"]], "content": message.get("value")}


def _string(fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise FaultyLine(f"{key!r} must be a string, is {type(value).__name__}")
    if not value:
        raise FaultyLine(f"{key!r} is empty")
    return value


def _token_ids(fields: dict[str, Any], key: str) -> list[int]:
    value = fields.get(key)
    # No isinstance: true and false are ints to it.
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise FaultyLine(f"{key!r} must be a list of token ids")
    return value
