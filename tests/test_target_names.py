"""A target has the same names wherever it lies, and another one has others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from vllm_ctc_spec.target_names import fingerprint, target_names


def weights(change: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"embed": torch.randn(5, 3), "norm": torch.ones(3), "proj": torch.randn(3, 3).to(torch.bfloat16)}
    tensors["scale"] = torch.tensor(1.0 + change)
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_how_the_weights_are_split_into_files_does_not_matter(tmp_path: Path) -> None:
    whole, split = write(tmp_path / "whole", weights()), tmp_path / "split"
    split.mkdir()
    for number, (name, tensor) in enumerate(reversed(weights().items())):
        save_file({name: tensor}, split / f"model-{number}.safetensors")
    assert fingerprint(whole) == fingerprint(split)
    assert target_names(str(whole)) == [fingerprint(whole)]


@pytest.mark.parametrize(
    "tensors",
    [
        weights(change=1e-3),
        {name: tensor.float() for name, tensor in weights().items()},
        {name: tensor for name, tensor in weights().items() if name != "norm"},
        weights() | {"embed": weights()["embed"][:4].clone()},
    ],
    ids=["a number", "a type", "a tensor less", "a row less"],
)
def test_another_target_has_another_fingerprint(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert fingerprint(write(tmp_path / "other", tensors)) != fingerprint(write(tmp_path / "target", weights()))


def test_without_weights_there_is_no_fingerprint(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) is None
    assert target_names(str(tmp_path)) == []


def test_a_target_of_the_hub_has_its_name_there_and_its_fingerprint_once_it_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert target_names("somebody/target") == ["somebody/target"]
    snapshot = write(tmp_path / "models--somebody--target" / "snapshots" / "abc", weights())
    refs = tmp_path / "models--somebody--target" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    expected = ["somebody/target", fingerprint(snapshot)]
    assert target_names("somebody/target") == expected
    # As an offline engine calls it.
    assert target_names(str(snapshot)) == expected
    assert target_names("somebody/target", cache_dir=str(tmp_path / "elsewhere")) == ["somebody/target"]
