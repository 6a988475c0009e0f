"""Lines of a source -> rows of token ids -> padded batches with sampled anchors.

Letters: B rows, L tokens, M anchors per row, U labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from vllm_ctc_spec.training.sources import (
    ANY_VOCAB_SIZE,
    FaultyLine,
    Line,
    checked,
    each_line,
    encode,
    messages_of,
    read_lines,
    render,
    string_of,
    token_ids_of,
)

ROW_KINDS = "'messages', 'conversations', 'text', or 'prompt_token_ids' with 'token_ids'"
FEWEST_FREQUENT, FREQUENT_SHARE = 2048, 4
BATCHES_SORTED = 50
"""Batches whose rows are sorted together: of regenerated chats 1 % is then padding, in any order 23 %."""

MISSING = -100
"""Stands for a label behind the end of an answer; torch's cross-entropy leaves it out, too."""


@dataclass(frozen=True)
class TrainingRow:
    token_ids: Tensor
    """[L] int64"""
    trained: Tensor
    """[L] bool, tokens that the drafter learns to predict; the rest is context only."""

    def usable_anchors(self, least_labels: int) -> Tensor:
        """Positions a >= 1 such that a and the `least_labels` tokens after it are trained."""
        if len(self.trained) <= least_labels + 1:
            return torch.empty(0, dtype=torch.int64)
        return 1 + self.trained[1:].unfold(0, least_labels + 1, 1).all(1).nonzero()[:, 0]

    def labels(self, anchors: Tensor, label_length: int) -> Tensor:
        """[M, U] int64, the tokens after anchors [M]; MISSING from the first that is not trained."""
        positions = anchors[:, None] + torch.arange(1, label_length + 1)
        inside = positions.clamp(max=len(self.token_ids) - 1)
        is_label = ((positions == inside) & self.trained[inside]).cumprod(1).bool()
        return self.token_ids[inside].where(is_label, MISSING)


@dataclass(frozen=True)
class AnchoredRow:
    token_ids: Tensor
    """[L] int64"""
    anchors: Tensor
    """[<= M] int64, positions"""
    labels: Tensor
    """[<= M, U] int64"""
    hidden: Tensor | None
    """[L, H], the target's last hidden states, where they are cached."""


class AnchorDataset(Dataset[AnchoredRow]):
    """Rows, each with at most M of its usable anchors, which have `least_labels` of the U labels or more.

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
        least_labels: int | None = None,
    ) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0
        self._label_length, self._num_anchors = label_length, anchors_per_row
        self._least_labels = label_length if least_labels is None else least_labels
        self._hidden = hidden

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AnchoredRow:
        row = self.rows[index]
        usable = row.usable_anchors(self._least_labels)
        drawn = np.random.default_rng((self.seed, self.epoch, index)).permutation(len(usable))[: self._num_anchors]
        hidden = None if self._hidden is None else self._hidden(index)
        anchors = usable[torch.from_numpy(drawn)]
        return AnchoredRow(row.token_ids, anchors, row.labels(anchors, self._label_length), hidden)


class SimilarRows(Sampler[int]):
    """Row numbers in an order in which the rows of a batch are of about one length, so that little of it is padding.

    The order depends on seed and epoch of `dataset` and on `batch_size` alone.
    """

    def __init__(self, dataset: AnchorDataset, batch_size: int) -> None:
        self._dataset, self._batch_size = dataset, batch_size

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        rows, rng = self._dataset.rows, np.random.default_rng((self._dataset.seed, self._dataset.epoch))
        drawn = rng.permutation(len(rows))
        # Not of all rows, or the same ones would share a batch in every epoch.
        for start in range(0, len(drawn), BATCHES_SORTED * self._batch_size):
            part = sorted(
                drawn[start : start + BATCHES_SORTED * self._batch_size], key=lambda i: len(rows[i].token_ids)
            )
            batches = [part[at : at + self._batch_size] for at in range(0, len(part), self._batch_size)]
            # A batch that is not whole stays last, or those behind it would begin in the middle of others.
            num_whole = len(part) // self._batch_size
            for number in (*rng.permutation(num_whole), *range(num_whole, len(batches))):
                yield from map(int, batches[number])


def collate_anchors(rows: Sequence[AnchoredRow]) -> dict[str, Tensor]:
    """Pads rows on the right: input_ids [B, L], anchors [B, M] (positions), valid [B, M] bool, labels [B, M, U]; where
    they are cached, hidden [B, L, H]."""
    anchors = pad_sequence([row.anchors for row in rows], batch_first=True)
    batch = {
        "input_ids": pad_sequence([row.token_ids for row in rows], batch_first=True),
        "anchors": anchors.clamp(min=1),
        "valid": anchors > 0,
        "labels": pad_sequence([row.labels for row in rows], batch_first=True),
    }
    hidden = [row.hidden for row in rows if row.hidden is not None]
    return batch | ({"hidden": pad_sequence(hidden, batch_first=True)} if hidden else {})


def with_anchors(rows: Sequence[TrainingRow], least_labels: int) -> list[TrainingRow]:
    """The rows that have at least one usable anchor."""
    return [row for row in rows if len(row.usable_anchors(least_labels))]


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

    def read(line: Line) -> TrainingRow:
        token_ids, trained = _encode_row(line.fields(), tokenizer)
        return TrainingRow(torch.tensor(checked(token_ids, vocab_size)), torch.tensor(trained))

    rows: list[TrainingRow] = []
    for row in each_line(islice(read_lines(source), max_lines), read, skipped):
        rows += map(TrainingRow, row.token_ids.split(max_length), row.trained.split(max_length))
    return rows


def _encode_row(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    if "token_ids" in fields:
        prompt, continuation = (token_ids_of(fields, key) for key in ("prompt_token_ids", "token_ids"))
        return prompt + continuation, [False] * len(prompt) + [True] * len(continuation)
    if "messages" in fields or "conversations" in fields:
        return _encode_messages(messages_of(fields), tokenizer)
    if "text" in fields:
        token_ids = encode(string_of(fields, "text"), tokenizer)["input_ids"]
        return token_ids, [True] * len(token_ids)
    raise FaultyLine(f"needs {ROW_KINDS}, has {sorted(fields)}")


def _encode_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Render once, and find each assistant turn as what it adds to the rendering of the turns before it."""
    text = render(messages, tokenizer, False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:turn], tokenizer, True)
        until = render(messages[: turn + 1], tokenizer, False)
        if not (text.startswith(until) and until.startswith(before)):
            raise FaultyLine(
                f"message {turn} is rendered differently once others follow it, so its tokens cannot be told apart; "
                "split the conversation so that this turn is its last, or use regenerated rows"
            )
        spans.append((len(before), len(until)))
    # The chat template has written the special tokens already.
    encoded = encode(text, tokenizer, add_special_tokens=False, return_offsets_mapping=True)
    trained = [any(start <= begin and end <= stop for start, stop in spans) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], trained
