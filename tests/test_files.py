"""A folder is replaced as a whole, or not at all."""

import pytest

from vllm_ctc_spec.files import atomic_folder


def test_the_folder_appears_when_the_body_has_succeeded(tmp_path):
    with atomic_folder(tmp_path / "a" / "model") as partial:
        (partial / "weights").write_text("new")
        assert not (tmp_path / "a" / "model").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]
    assert (tmp_path / "a" / "model" / "weights").read_text() == "new"


def test_a_failure_leaves_the_old_folder_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(folder) as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "weights").read_text() == "old"


def test_success_replaces_the_old_folder_and_leftovers_of_a_kill(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale").write_text("old")
    leftover = tmp_path / ".model.partial"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with atomic_folder(folder) as partial:
        (partial / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["weights"]
