"""Lines of files and data sets, and the text, token ids and messages in them."""

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
    """What is wrong with one line; the reader of the lines adds where it stands, and may leave it out."""


@dataclass(frozen=True)
class Line:
    where: str
    """The source, and the number of the line or row in it, from 1."""
    content: Any
    """JSON text as bytes, or what another reader has parsed."""

    def fields(self) -> dict[str, Any]:
        """The line's object. Raises `FaultyLine` if it is not JSON or no object."""
        try:
            fields = json.loads(self.content) if isinstance(self.content, bytes) else self.content
        except (ValueError, RecursionError) as error:
            raise FaultyLine(f"is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise FaultyLine(f"is {type(fields).__name__}, not a JSON object")
        return fields


def read_lines(source: str | Path) -> Iterator[Line]:
    """Yield the lines of a file, or else the rows of a data set `NAME` or `NAME:SPLIT` (split "train" if not given).

    A file is JSONL, or a `.json` file with one array of objects. `NAME` is a folder, of data files or written by
    `save_to_disk`, or a name on the Hugging Face hub.
    Raises ValueError if there is no such source or split; a line that cannot be parsed fails in `Line.fields`.
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
            # Files of JSON lines are called .json as well, so the suffix alone does not tell.
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
    """Yield the rows of a split; of a data set that has them, from a subset. Raises ValueError."""
    splits = _load_splits(name, subset)
    if split not in splits:
        raise ValueError(
            f"data set {name!r} has no split {split!r}, only {sorted(splits)}. Choose one: '{name}:{min(splits)}'."
        )
    # A saved data set may remember to hand out tensors.
    for number, row in enumerate(splits[split].with_format(None), start=1):
        # A data set has the same columns in every row: None stands where the row lacks one.
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
    except Exception as error:  # The network, the hub and the readers of many formats raise what they like.
        tried = "a local folder" if folder.is_dir() else "neither a file nor a folder here, so a Hugging Face hub name"
        raise ValueError(
            f"data set {name!r} cannot be read: it is {tried}, and datasets.{load.__name__} failed "
            f"({type(error).__name__}: {error.__cause__ or error}). "
            "Check the name and, for a hub name, the network; or give a JSONL file, or a folder of such files."
        ) from error
    # A single data set was saved without names for splits.
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

Read = TypeVar("Read")


def each_line(lines: Iterable[Line], read: Callable[[Line], Read], skipped: list[str] | None) -> Iterator[Read]:
    """`read` of each line. Raises ValueError at the first faulty one, or describes it in `skipped` and goes on."""
    for line in lines:
        try:
            result = read(line)
        except FaultyLine as error:
            message = f"{line.where}: {error}."
            if skipped is None:
                raise ValueError(message) from error
            skipped.append(message)
        else:
            yield result


def messages_of(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of `messages` or of ShareGPT's `conversations`, at least one."""
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


def string_of(fields: dict[str, Any], key: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise FaultyLine(f"{key!r} must be a string, is {type(value).__name__}")
    if not value:
        raise FaultyLine(f"{key!r} is empty")
    return value


def token_ids_of(fields: dict[str, Any], key: str) -> list[int]:
    value = fields.get(key)
    # No isinstance: true and false are ints to it.
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise FaultyLine(f"{key!r} must be a list of token ids")
    return value


def checked(token_ids: list[int], vocab_size: int) -> list[int]:
    if not token_ids:
        raise FaultyLine("has no tokens")
    for token in (min(token_ids), max(token_ids)):
        if not 0 <= token < vocab_size:
            raise FaultyLine(f"has token id {token}, must be from 0 to {vocab_size - 1}")
    return token_ids


def encode(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes.
        raise FaultyLine(f"has text that is not Unicode ({error.reason})") from error
    return tokenizer(text, **options)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:  # None at all, or several and no default.
        return False


def render(messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, generate: bool) -> str:
    """The chat template's text, special tokens included. Raises ValueError where the tokenizer has no template."""
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
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=generate
            )
        )
    except Exception as error:  # Templates raise what they like: jinja's errors, ValueError, TypeError.
        raise FaultyLine(f"the tokenizer's chat template refuses the messages ({error})") from error
