"""Lines of a source -> rows of token ids -> padded batches with sampled anchors.

Letters: B rows, L tokens, M anchors per row, U labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

ROW_KINDS = "'messages', 'conversations', 'text', or 'prompt_token_ids' with 'token_ids'"
MIN_FREQUENT, FREQUENT_DIVISOR = 2048, 4
BATCHES_SORTED = 50
"""Batches whose rows are sorted by length together. With regenerated chats 1 % is then padding, unsorted 23 %."""

MISSING = -100
"""Label after the end of an answer. It is the index that torch's cross-entropy ignores by default."""


@dataclass(frozen=True)
class TrainingRow:
    token_ids: Tensor
    """[L] int64"""
    trained: Tensor
    """[L] bool, true for tokens that the drafter learns to predict; the others are context."""
    is_replay: bool = False
    """Of earlier text, of which each epoch has a share."""

    def usable_anchors(self, min_labels: int) -> Tensor:
        """[n] int64, positions a >= 1 where a and the `min_labels` tokens after it are trained."""
        if len(self.trained) <= min_labels + 1:
            return torch.empty(0, dtype=torch.int64)
        return 1 + self.trained[1:].unfold(0, min_labels + 1, 1).all(1).nonzero()[:, 0]

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
    """Rows, each with up to M random anchors that have at least `min_labels` of their U labels.

    The anchors depend on seed, epoch and row only, so a resumed run draws the same ones.
    hidden: row number -> [L, H], the target's hidden states if they are cached.
    replay_share: share of the rows of an epoch that are replayed ones.
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        label_length: int,
        anchors_per_row: int,
        seed: int = 0,
        hidden: Callable[[int], Tensor] | None = None,
        min_labels: int | None = None,
        replay_share: float = 0.0,
    ) -> None:
        self.rows, self.seed, self.epoch, self.replay_share = rows, seed, 0, replay_share
        self._label_length, self._num_anchors = label_length, anchors_per_row
        self._min_labels = label_length if min_labels is None else min_labels
        self._hidden = hidden

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AnchoredRow:
        row = self.rows[index]
        usable = row.usable_anchors(self._min_labels)
        drawn = np.random.default_rng((self.seed, self.epoch, index)).permutation(len(usable))[: self._num_anchors]
        hidden = None if self._hidden is None else self._hidden(index)
        anchors = usable[torch.from_numpy(drawn)]
        return AnchoredRow(row.token_ids, anchors, row.labels(anchors, self._label_length), hidden)


class SimilarRows(Sampler[int]):
    """Row numbers of an epoch, ordered so that the rows of a batch have similar lengths and little of it is padding.

    An epoch has every new row, and replayed rows up to their share: a part of them, or some several times. The order
    depends only on `batch_size` and on seed and epoch of `dataset`.
    """

    def __init__(self, dataset: AnchorDataset, batch_size: int) -> None:
        self._dataset, self._batch_size = dataset, batch_size
        is_replay = np.array([row.is_replay for row in dataset.rows], dtype=bool)
        self._new, self._replayed = np.flatnonzero(~is_replay), np.flatnonzero(is_replay)
        per_new_row = dataset.replay_share / (1 - dataset.replay_share)
        self._num_replayed = math.ceil(per_new_row * len(self._new)) if len(self._replayed) else 0

    def __len__(self) -> int:
        return len(self._new) + self._num_replayed

    def __iter__(self) -> Iterator[int]:
        rows, rng = self._dataset.rows, np.random.default_rng((self._dataset.seed, self._dataset.epoch))
        replayed = np.resize(rng.permutation(self._replayed), self._num_replayed)
        drawn = rng.permutation(np.concatenate((self._new, replayed)))
        # Sorting all rows together would put the same ones into a batch in every epoch.
        for start in range(0, len(drawn), BATCHES_SORTED * self._batch_size):
            part = sorted(
                drawn[start : start + BATCHES_SORTED * self._batch_size], key=lambda i: len(rows[i].token_ids)
            )
            batches = [part[at : at + self._batch_size] for at in range(0, len(part), self._batch_size)]
            # An incomplete batch must stay last: the data loader cuts the order into batches of equal size.
            num_whole = len(part) // self._batch_size
            for number in (*rng.permutation(num_whole), *range(num_whole, len(batches))):
                yield from map(int, batches[number])


def collate_anchors(rows: Sequence[AnchoredRow]) -> dict[str, Tensor]:
    """Rows padded on the right: input_ids [B, L], anchors [B, M] (positions), valid [B, M] bool (false for padding),
    labels [B, M, U], and hidden [B, L, H] if hidden states are cached."""
    anchors = pad_sequence([row.anchors for row in rows], batch_first=True)
    batch = {
        "input_ids": pad_sequence([row.token_ids for row in rows], batch_first=True),
        "anchors": anchors.clamp(min=1),
        "valid": anchors > 0,
        "labels": pad_sequence([row.labels for row in rows], batch_first=True),
    }
    hidden = [row.hidden for row in rows if row.hidden is not None]
    return batch | ({"hidden": pad_sequence(hidden, batch_first=True)} if hidden else {})


def with_anchors(rows: Sequence[TrainingRow], min_labels: int) -> list[TrainingRow]:
    """The rows that have at least one usable anchor."""
    return [row for row in rows if len(row.usable_anchors(min_labels))]


def num_frequent(vocab_size: int) -> int | None:
    """Number of tokens that make up nearly all text: max(MIN_FREQUENT, V / FREQUENT_DIVISOR); None if that is all V."""
    number = max(MIN_FREQUENT, vocab_size // FREQUENT_DIVISOR)
    return number if number < vocab_size else None


def most_frequent(
    rows: Sequence[TrainingRow], vocab_size: int, num_tokens: int, preferred: Tensor | None = None
) -> Tensor:
    """[num_tokens] int64, the most frequent of the trained tokens, the most frequent first.

    preferred: tokens that go before others which are as frequent, or as rare.
    """
    trained = torch.cat([row.token_ids[row.trained] for row in rows])
    counts = torch.bincount(trained, minlength=vocab_size).double()
    if preferred is not None:
        counts[preferred] += 0.5
    return counts.topk(num_tokens).indices


def read_rows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    skipped: list[str] | None = None,
    *,
    vocab_size: int = ANY_VOCAB_SIZE,
    max_lines: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[TrainingRow]:
    """Read training rows; a row of more than `max_length` tokens is cut into consecutive windows.

    `source` is a file or a data set, see `read_lines`. A line holds `messages` or the ShareGPT layout `conversations`
    (only assistant turns are trained), `text` (all of it is trained), or a regenerated row with `prompt_token_ids` and
    `token_ids` (only the latter are trained). Token ids must be below `vocab_size`. Only the first `max_lines` lines
    are read, if given. chat_template_kwargs: further variables of the chat template.

    Raises ValueError at the first faulty line; with `skipped`, appends a description of it there and goes on. Always
    raises ValueError if the source cannot be read, or if messages need a chat template that the tokenizer lacks.
    """

    template = ChatTemplate(tokenizer, chat_template_kwargs)

    def parse(line: Line) -> TrainingRow:
        token_ids, trained = _encode_row(line.fields(), template)
        return TrainingRow(torch.tensor(checked_token_ids(token_ids, vocab_size)), torch.tensor(trained))

    rows: list[TrainingRow] = []
    for row in parse_lines(islice(read_lines(source), max_lines), parse, skipped):
        rows += map(TrainingRow, row.token_ids.split(max_length), row.trained.split(max_length))
    return rows


def _encode_row(fields: dict[str, Any], template: ChatTemplate) -> tuple[list[int], list[bool]]:
    if "token_ids" in fields:
        prompt, continuation = (token_ids_of(fields, key) for key in ("prompt_token_ids", "token_ids"))
        return prompt + continuation, [False] * len(prompt) + [True] * len(continuation)
    if "messages" in fields or "conversations" in fields:
        return _encode_messages(messages_of(fields), template)
    if "text" in fields:
        token_ids = encode(string_of(fields, "text"), template.tokenizer)["input_ids"]
        return token_ids, [True] * len(token_ids)
    raise FaultyLine(f"needs {ROW_KINDS}, has {sorted(fields)}")


def _encode_messages(messages: list[dict[str, Any]], template: ChatTemplate) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them are trained: those of assistant turns.

    An assistant turn is found as the text that it adds to the rendering of the turns before it.
    """
    text = template.render(messages, add_generation_prompt=False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:turn], add_generation_prompt=True)
        until = template.render(messages[: turn + 1], add_generation_prompt=False)
        if not (text.startswith(until) and until.startswith(before)):
            raise FaultyLine(
                f"message {turn} is rendered differently once others follow it, so its tokens cannot be told apart; "
                "split the conversation so that this turn is its last, or use regenerated rows"
            )
        spans.append((len(before), len(until)))
    # The chat template has written the special tokens already.
    encoded = encode(text, template.tokenizer, add_special_tokens=False, return_offsets_mapping=True)
    trained = [any(start <= begin and end <= stop for start, stop in spans) for begin, end in encoded["offset_mapping"]]
    return encoded["input_ids"], trained
