"""A drafter is found by its path, its name on the hub, or its target; and where there is none, that is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from vllm_ctc_spec.demo.pair import HUB_NAME, NAME
from vllm_ctc_spec.drafter.lookup import OWN, Hub, find_drafter, names_a_drafter
from vllm_ctc_spec.target_names import fingerprint

REPO = "somebody/drafter"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose caches are empty, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_drafter(folder: Path, *targets: str, age: int = 0) -> str:
    """As much of one as finding it needs. age: in seconds."""
    folder.mkdir(parents=True)
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "ctc_drafter", "targets": targets}))
    os.utime(config, (1e9 - age, 1e9 - age))
    return str(folder)


def in_hub_cache(home: Path, repo: str, commit: str, ref: str) -> Path:
    """Where the hub's client would have put that commit; `ref` is a branch or tag that points to it."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture
def target(home: Path) -> Path:
    folder = home / "target"
    folder.mkdir()
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    return folder


def test_a_name_of_the_hub_is_looked_up_in_the_users_cache_at_its_revision(home: Path) -> None:
    latest = write_drafter(in_hub_cache(home, REPO, "1" * 40, "main"))
    earlier = write_drafter(in_hub_cache(home, REPO, "2" * 40, "v1"))
    assert find_drafter(REPO, "target") == latest
    assert find_drafter(REPO, "target", revision="v1") == earlier
    assert find_drafter(REPO, "target", revision="2" * 40) == earlier
    assert find_drafter(REPO, "target", hub=Hub(cache_dir=str(home / "hub"))) == latest
    assert names_a_drafter(REPO) and names_a_drafter(REPO, "v1")
    assert not names_a_drafter(REPO, hub=Hub(cache_dir=str(home / "elsewhere")))


def test_a_path_that_exists_goes_before_a_name(home: Path) -> None:
    write_drafter(in_hub_cache(home, REPO, "1" * 40, "main"))
    write_drafter(home / REPO)
    assert find_drafter(REPO, "target") == REPO
    write_drafter(home / OWN)
    assert find_drafter(OWN, "target") == OWN


@pytest.mark.parametrize(("revision", "at"), [(None, "hub "), ("v2", "hub at revision 'v2' ")])
def test_a_name_that_cannot_be_fetched_is_one_error(home: Path, revision: str | None, at: str) -> None:
    write_drafter(in_hub_cache(home, REPO, "1" * 40, "main"))
    name = REPO if revision else "nobody/nothing"
    with pytest.raises(
        ValueError,
        match=rf"drafter '{name}' is not a folder, and cannot be fetched from the Hugging Face {at}\(.*HF_TOKEN",
    ):
        find_drafter(name, "target", revision)
    assert not names_a_drafter("nobody/nothing")


@pytest.mark.parametrize("model", [OWN, None])
def test_the_targets_own_lies_beside_it_or_names_it(home: Path, target: Path, model: str | None) -> None:
    own = fingerprint(target)
    assert own is not None
    with pytest.raises(ValueError, match=r"no CTC drafter on this machine belongs to target '.*/target'\. Train one"):
        find_drafter(model, str(target))
    write_drafter(in_hub_cache(home, "somebody/another", "3" * 40, "main"), "sha256:0")
    downloaded = write_drafter(in_hub_cache(home, REPO, "1" * 40, "main"), "somebody/target", own, age=60)
    assert find_drafter(model, str(target)) == downloaded
    assert find_drafter(model, "somebody/target") == downloaded
    latest = write_drafter(home / "cache" / "vllm_ctc_spec" / "drafters" / "mine", own)
    assert find_drafter(model, str(target)) == latest
    beside = write_drafter(target / OWN)
    assert find_drafter(model, str(target)) == beside


def test_the_package_has_the_drafter_of_its_default_target() -> None:
    assert Path(find_drafter(OWN, HUB_NAME)).name == NAME


def test_other_models_are_not_taken_for_drafters(home: Path, target: Path) -> None:
    snapshot = in_hub_cache(home, "somebody/target", "1" * 40, "main")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama", "targets": ["somebody/target"]}')
    assert not any(map(names_a_drafter, ["somebody/target", target, "no/such/folder", 5, ""]))
    with pytest.raises(ValueError, match="no CTC drafter"):
        find_drafter(OWN, "somebody/target")
