"""Where training lines come from: JSONL files, JSON arrays, local data sets and the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
