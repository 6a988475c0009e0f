"""Reads lines of files and data sets, and the text, token ids and messages in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from transformers import PreTrainedTokenizerBase

JSON_SUFFIXES = (".json", ".jsonl")
BLANK_OR_BOM = b" \t\r\n\xef\xbb\xbf"


class FaultyLine(Exception):
    """One line cannot be used; the message says why. `parse_lines` adds the line's number, or leaves the line out."""


@dataclass(frozen=True)
class Line:
    where: str
    """Source and number of the line or row, counted from 1."""
    content: Any
    """JSON text as bytes, or the parsed object."""

    def fields(self) -> dict[str, Any]:
        """The line's JSON object. Raises FaultyLine if it is not one."""
        try:
            fields = json.loads(self.content) if isinstance(self.content, bytes) else self.content
        except (ValueError, RecursionError) as error:
            raise FaultyLine(f"is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise FaultyLine(f"is {type(fields).__name__}, not a JSON object")
        return fields


def read_lines(source: str | Path) -> Iterator[Line]:
    """Yield the lines of a file, or the rows of a data set `NAME` or `NAME:SPLIT` (default split: "train").

    A file is JSONL, or `.json` with one array of objects. `NAME` is a folder with data files, a folder written by
    `save_to_disk`, or a name on the Hugging Face hub. Raises ValueError if there is no such source or split. Lines are
    parsed later, in `Line.fields`.
    """
    path = Path(source)
    if path.is_dir():
        return read_dataset(str(source), "train")
    name, *split = str(source).rsplit(":", 1)
    if path.exists() or Path(name).is_file() or name.endswith(JSON_SUFFIXES):
        return _read_file(path)
    return read_dataset(name, split[0] if split else "train")


def _read_file(path: Path) -> Iterator[Line]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(
            f"data file {str(path)!r} cannot be read ({error.strerror}). Give the path of an existing file, "
            "without a split: only data sets have splits."
        ) from error
    with file:
        if path.suffix == ".json":
            # Some .json files hold one object per line.
            is_array = file.read(100).lstrip(BLANK_OR_BOM).startswith(b"[")
            file.seek(0)
            if is_array:
                yield from _read_array(path, file)
                return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Line(f"{path}, line {number}", line)


def _read_array(path: Path, file: BinaryIO) -> Iterator[Line]:
    try:
        rows = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data file {str(path)!r} begins like a JSON array but is not JSON ({error}). "
            "Repair it, or write one object per line."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield Line(f"{path}, row {number}", row)


def read_dataset(name: str, split: str, subset: str | None = None) -> Iterator[Line]:
    """Yield the rows of a split. subset: configuration of a hub data set. Raises ValueError if it cannot be read."""
    splits = _load_splits(name, subset)
    if split not in splits:
        raise ValueError(
            f"data set {name!r} has no split {split!r}, only {sorted(splits)}. Choose one: '{name}:{min(splits)}'."
        )
    # A saved data set may be set to return tensors.
    for number, row in enumerate(splits[split].with_format(None), start=1):
        # A data set has the same columns in every row, with None for fields that a row lacks.
        yield Line(f"{name}:{split}, row {number}", {key: value for key, value in row.items() if value is not None})


def _load_splits(name: str, subset: str | None) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name!r} is not a file, and reading it as a data set needs the datasets library: "
            'pip install "vllm-ctc-spec[train]".'
        ) from error
    folder = Path(name)
    saved = subset is None and any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    load = datasets.load_from_disk if saved else datasets.load_dataset
    try:
        data = load(name) if subset is None else load(name, subset)
    except Exception as error:  # The network, the hub and the readers of many formats raise errors of many types.
        tried = "a local folder" if folder.is_dir() else "neither a file nor a folder here, so a Hugging Face hub name"
        raise ValueError(
            f"data set {name!r} cannot be read: it is {tried}, and datasets.{load.__name__} failed "
            f"({type(error).__name__}: {error.__cause__ or error}). "
            "Check the name and, for a hub name, the network; or give a JSONL file, or a folder of such files."
        ) from error
    # A single data set that was saved has no named splits.
    return data if isinstance(data, Mapping) else {"train": data}


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

Parsed = TypeVar("Parsed")


def parse_lines(lines: Iterable[Line], parse: Callable[[Line], Parsed], skipped: list[str] | None) -> Iterator[Parsed]:
    """Yield `parse` of each line. Where it raises FaultyLine: raises ValueError, or with `skipped` appends there a
    description of the line and goes on."""
    for line in lines:
        try:
            result = parse(line)
        except FaultyLine as error:
            message = f"{line.where}: {error}."
            if skipped is None:
                raise ValueError(message) from error
            skipped.append(message)
        else:
            yield result


def messages_of(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages in `messages` or in ShareGPT's `conversations`, at least one. Raises FaultyLine."""
    sharegpt = "messages" not in fields
    key, role, content = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    messages = fields[key]
    if not isinstance(messages, list) or not all(_is_message(message, role, content) for message in messages):
        raise FaultyLine(f"{key!r} must be a list of objects with {role!r} and {content!r}")
    if not messages:
        raise FaultyLine(f"{key!r} is empty")
    if sharegpt:
        return [_from_sharegpt(message) for message in messages]
    # Data sets fill absent fields with None, but templates test whether a field exists.
    return [{k: v for k, v in message.items() if v is not None or k == content} for message in messages]


def _is_message(message: Any, role: str, content: str) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get(role), str):
        return False
    # Content may be None if a message only calls tools. In other messages a template would print "None".
    return isinstance(message.get(content), str | list) or bool(message.get("tool_calls"))


def _from_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    if message["from"] not in SHAREGPT_ROLES:
        raise FaultyLine(f"'conversations' has 'from' {message['from']!r}, must be one of {sorted(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[message["from"]], "content": message.get("value")}


def string_of(fields: dict[str, Any], key: str) -> str:
    """Raises FaultyLine if the value is no string or empty."""
    value = fields[key]
    if not isinstance(value, str):
        raise FaultyLine(f"{key!r} must be a string, is {type(value).__name__}")
    if not value:
        raise FaultyLine(f"{key!r} is empty")
    return value


def token_ids_of(fields: dict[str, Any], key: str) -> list[int]:
    """Raises FaultyLine if the value is no list of integers."""
    value = fields.get(key)
    # Not isinstance, which takes true and false for integers.
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise FaultyLine(f"{key!r} must be a list of token ids")
    return value


def checked_token_ids(token_ids: list[int], vocab_size: int) -> list[int]:
    """`token_ids`. Raises FaultyLine if there are none, or if one is not below `vocab_size`."""
    if not token_ids:
        raise FaultyLine("has no tokens")
    for token in (min(token_ids), max(token_ids)):
        if not 0 <= token < vocab_size:
            raise FaultyLine(f"has token id {token}, must be from 0 to {vocab_size - 1}")
    return token_ids


def encode(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """`tokenizer(text, **options)`. Raises FaultyLine if the text is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can encode half a surrogate pair, which tokenizers do not accept.
        raise FaultyLine(f"has text that is not Unicode ({error.reason})") from error
    return tokenizer(text, **options)


@dataclass(frozen=True)
class ChatTemplate:
    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any] | None = None
    """Variables of the template beside the messages, such as `enable_thinking`: `chat_template_kwargs` of vLLM."""

    @property
    def is_there(self) -> bool:
        try:
            return bool(self.tokenizer.get_chat_template())
        except ValueError:  # Raised without any template, and with several of which none is the default.
            return False

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The template's text, special tokens included.

        Raises ValueError if the tokenizer has no template, FaultyLine if the template fails on the messages.
        """
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no default chat template, which 'messages' and "
                "'conversations' need. Put the model's chat_template.jinja into the tokenizer's folder (or set "
                "'chat_template' in its tokenizer_config.json), or give rows of 'text' and prompts of 'prompt'."
            ) from error
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self.kwargs or {},
                )
            )
        except Exception as error:  # Templates raise errors of many types: jinja's, ValueError, TypeError.
            raise FaultyLine(f"the tokenizer's chat template refuses the messages ({error})") from error
