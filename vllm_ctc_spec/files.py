"""Writes files, folders and lines whole or not at all, records which run they belong to, and finds the user's cache."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RECORD = "settings.json"
"""File with the settings of the run to which a folder belongs."""


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, and rename it to `path` when the body succeeds.

    An existing folder is replaced only then; between the two renames it is `.<name>.old`.
    """
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, contents: bytes) -> None:
    """Replace the file at `path`. On return `contents` are on disk; after an error the old file is unchanged."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Yield a descriptor of the file for one process at a time. A new file is its owner's alone. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def append_line(path: Path, line: bytes, max_bytes: int) -> bool:
    """Append a line unless the file would be larger than `max_bytes`; returns whether it was appended.

    Several processes may append to one file. Raises OSError; the file is unchanged then.
    """
    with locked(path) as file:
        size = os.fstat(file).st_size
        if size + len(line) > max_bytes:
            return False
        if os.write(file, line) < len(line):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return True


def cut_incomplete_line(path: Path) -> None:
    """Cut off a last line without its end, as a killed process leaves it. Raises OSError."""
    with locked(path) as file:
        if os.fstat(file).st_size:
            with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as content:
                num_whole = content.rfind(b"\n") + 1
            os.ftruncate(file, num_whole)


def save_png(figure: Figure, path: Path, dpi: int, **options: Any) -> None:
    """Write a PNG atomically. options: further ones of matplotlib's `savefig`."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=dpi, **options)
    write_atomically(path, png.getvalue())


def user_cache(name: str) -> Path:
    """The package's folder `name` in the user's cache (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_ctc_spec" / name


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Create a folder for checkpoints; if it exists, check that its run had the same settings.

    settings: JSON values by name. Raises ValueError that names the first setting that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, folder / RECORD, settings)


def claim_file(path: Path, settings: dict[str, Any]) -> None:
    """As `claim`, for a file of lines, with the record beside it. The record of an empty file is replaced."""
    record = path.with_name(f"{path.name}.settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.stat().st_size:
        record.unlink(missing_ok=True)
    _claim(path, record, settings)


def is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` is the finished output of a run with the same settings.

    Raises ValueError if it holds anything else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    record = folder / RECORD
    if not record.exists():
        raise ValueError(
            f"{str(folder)!r} is there already, and does not say of which run. Name another folder, or delete it to "
            "train again."
        )
    _claim(folder, record, settings, is_done=True)
    return True


def _claim(claimed: Path, record: Path, settings: dict[str, Any], is_done: bool = False) -> None:
    settings = json.loads(json.dumps(settings))
    if not record.exists():
        write_atomically(record, json.dumps(settings, indent=2).encode())
        return
    earlier = json.loads(record.read_text())
    for name in settings.keys() | earlier.keys():
        if settings.get(name) != earlier.get(name):
            run = "a run" if is_done else "an unfinished run"
            raise ValueError(
                f"{str(claimed)!r} holds {run} with {name}={earlier.get(name)!r}; this one has "
                f"{settings.get(name)!r}. Go on with the earlier value, or delete the "
                f"{'folder' if claimed.is_dir() else 'file'} to start again."
            )
