"""Cached hidden states are the target's, also after the run that wrote them was interrupted."""

import errno
import os
import pickle
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.training.tiny_models import VOCAB, tiny_target
from vllm_ctc_spec.training import hidden_cache as cache_module
from vllm_ctc_spec.training import hidden_sources as sources_module
from vllm_ctc_spec.training.data import TrainingRow
from vllm_ctc_spec.training.hidden_cache import HiddenCache, plan_shards, write_cache
from vllm_ctc_spec.training.hidden_sources import InProcess
from vllm_ctc_spec.training.objective import target_hidden

SHARD_BYTES = 40 * 32 * 4
DiskUsage = namedtuple("DiskUsage", "total used free")


def training_row(token_ids):
    return TrainingRow(token_ids, torch.ones(len(token_ids), dtype=torch.bool))


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(2)
    lengths = (5, 31, 17, 2, 50, 17, 9, 31, 1, 23)
    return [training_row(torch.randint(VOCAB, (length,), generator=generator)) for length in lengths]


@pytest.fixture(scope="module")
def saved_target(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    tiny_target().save_pretrained(path)
    return str(path)


@pytest.fixture
def target_path(saved_target, tmp_path):
    """A copy that a test may change."""
    return str(shutil.copytree(saved_target, tmp_path / "target"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def write(folder, target_path, rows, **settings):
    batch_size = settings.pop("batch_size", 3)
    source = InProcess(tiny_target(), batch_size)
    write_cache(folder, source, target_path, rows, **{"shard_bytes": SHARD_BYTES} | settings)


def load(folder, target_path, rows, dtype=torch.float32):
    return HiddenCache(folder, target_path, rows, dtype)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shards(folder):
    return sorted(folder.glob("hidden-*.safetensors"))


@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, ()), (torch.bfloat16, ()), (torch.float32, (0, 1))])
def test_a_cached_row_is_what_the_target_gives_for_that_row_alone(folder, target_path, rows, dtype, layers):
    target = tiny_target().to(dtype)
    write_cache(folder, InProcess(target, 3), target_path, rows, layers, SHARD_BYTES)
    cache = HiddenCache(folder, target_path, rows, dtype, layers)
    assert len(shards(folder)) > 2
    assert len(cache) == len(rows)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for number, row in enumerate(rows):
        alone = target_hidden(target, row.token_ids[None], layers)[0]
        torch.testing.assert_close(cache[number], alone, atol=tolerance, rtol=tolerance)


def test_shards_and_batches_of_any_size_hold_the_same_states(tmp_path, target_path, rows):
    caches = []
    for shard_bytes, batch_size in ((1, 1), (SHARD_BYTES, 4), (1 << 30, 100)):
        folder = tmp_path / str(shard_bytes)
        write(folder, target_path, rows, shard_bytes=shard_bytes, batch_size=batch_size)
        caches.append(load(folder, target_path, rows))
    for number in range(len(rows)):
        for other in caches[1:]:
            torch.testing.assert_close(caches[0][number], other[number], atol=1e-5, rtol=1e-5)


def test_a_pickled_cache_gives_the_same_states(folder, target_path, rows):
    write(folder, target_path, rows)
    cache = load(folder, target_path, rows)
    before = cache[4]
    assert torch.equal(pickle.loads(pickle.dumps(cache))[4], before)


@given(st.lists(st.integers(1, 40)), st.integers(1, 8), st.integers(1, 400))
def test_a_plan_holds_each_row_once_and_no_shard_more_than_its_bytes_but_one_large_row(lengths, token_bytes, most):
    plan = plan_shards(lengths, token_bytes, most)
    assert sorted(row for shard in plan for row in shard) == list(range(len(lengths)))
    for shard in plan:
        assert shard
        assert len(shard) == 1 or sum(lengths[row] for row in shard) * token_bytes <= most
    in_order = [lengths[row] for shard in plan for row in shard]
    assert in_order == sorted(lengths, reverse=True)


@pytest.mark.parametrize("written", range(5))
def test_a_run_killed_before_any_file_is_in_place_goes_on_to_the_same_bytes(
    tmp_path, folder, target_path, rows, monkeypatch, written
):
    write(tmp_path / "whole", target_path, rows)
    assert len(contents(tmp_path / "whole")) > 5
    moved = []

    def die(source, path):
        if len(moved) == written:
            raise KeyboardInterrupt
        moved.append(path)
        return rename(source, path)

    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        write(folder, target_path, rows)
    assert len(shards(folder)) == max(0, written - 1)
    with pytest.raises(ValueError, match=r"manifest|is not whole"):
        load(folder, target_path, rows)
    write(folder, target_path, rows)
    assert contents(folder) == contents(tmp_path / "whole")


def drop(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def lose_the_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def change(path, function):
    """Put function(hidden) in place of the shard's hidden states and leave its metadata."""
    with safe_open(path, "pt") as file:
        metadata, hidden = file.metadata(), file.get_tensor("hidden").clone()
    save_file({"hidden": function(hidden)}, path, metadata)


def turn_into_int32(path):
    change(path, lambda hidden: hidden.view(torch.int32))


def lose_a_token(path):
    change(path, lambda hidden: hidden[1:])


def belong_to_another_cache(path):
    save_file(load_file(path), path, metadata={"manifest": "0" * 64})


@pytest.mark.parametrize("shard", [0, 1, -1])
@pytest.mark.parametrize(
    "damage", [drop, empty, lose_the_last_byte, turn_into_int32, lose_a_token, belong_to_another_cache]
)
def test_a_damaged_shard_is_refused_by_name_and_alone_written_again(
    folder, target_path, rows, monkeypatch, damage, shard
):
    write(folder, target_path, rows)
    whole, path = contents(folder), shards(folder)[shard]
    damage(path)
    with pytest.raises(ValueError, match=path.name):
        load(folder, target_path, rows)
    ran = []
    monkeypatch.setattr(sources_module, "target_hidden", lambda *given: ran.append(given[1]) or target_hidden(*given))
    write(folder, target_path, rows)
    assert contents(folder) == whole
    assert sum(map(len, ran)) < len(rows)


def test_a_whole_cache_runs_the_target_no_more(folder, target_path, rows, monkeypatch):
    write(folder, target_path, rows)
    monkeypatch.setattr(sources_module, "target_hidden", None)
    write(folder, target_path, rows)


def test_a_resumed_run_keeps_the_plan_it_began_with(folder, target_path, rows):
    write(folder, target_path, rows)
    whole = contents(folder)
    shards(folder)[0].unlink()
    write(folder, target_path, rows, shard_bytes=1)
    assert contents(folder) == whole


def refused_as(other, folder, target_path, rows, dtype=torch.float32, layers=()):
    message = f"another {other}. Delete the folder"
    before = contents(folder)
    for act in (
        lambda: HiddenCache(folder, target_path, rows, dtype, layers),
        lambda: write_cache(folder, InProcess(tiny_target().to(dtype)), target_path, rows, layers),
    ):
        with pytest.raises(ValueError) as error:
            act()
        assert message in str(error.value)
        assert str(folder) in str(error.value)
    assert contents(folder) == before


def test_other_rows_are_refused(folder, target_path, rows):
    write(folder, target_path, rows)
    changed = rows[3].token_ids.clone()
    changed[0] = (changed[0] + 1) % VOCAB
    head, tail = rows[0].token_ids, rows[1].token_ids
    moved = [training_row(torch.cat([head, tail[:1]])), training_row(tail[1:])]
    for others in (
        rows[:-1],
        rows[::-1],
        [*rows[:3], training_row(changed), *rows[4:]],
        [*moved, *rows[2:]],
    ):
        refused_as("rows", folder, target_path, others)


def test_rows_that_differ_in_what_is_trained_share_a_cache(folder, target_path, rows):
    write(folder, target_path, rows)
    load(folder, target_path, [replace(row, trained=~row.trained) for row in rows])


def test_another_dtype_is_refused(folder, target_path, rows):
    write(folder, target_path, rows)
    refused_as("dtype", folder, target_path, rows, torch.bfloat16)


def test_one_changed_weight_or_setting_of_the_target_is_noticed(folder, target_path, rows):
    write(folder, target_path, rows)
    for name in ("model.safetensors", "config.json"):
        path = Path(target_path) / name
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        refused_as("target", folder, target_path, rows)
        path.write_bytes(before)
    load(folder, target_path, rows)


def test_every_difference_is_named(folder, target_path, rows):
    write(folder, target_path, rows)
    refused_as("rows, another dtype", folder, target_path, rows[1:], torch.bfloat16)
    refused_as("layers", folder, target_path, rows, torch.float32, [1])


def test_a_target_without_weights_is_refused(folder, target_path, rows):
    (Path(target_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\*\.safetensors"):
        write(folder, target_path, rows)


@pytest.mark.parametrize("manifest", [None, b"", b"[]", b"{}", b'{"made_of": {}, "more": 1}'])
def test_a_folder_without_a_manifest_of_ours_is_refused(folder, target_path, rows, manifest):
    folder.mkdir()
    if manifest is not None:
        (folder / "manifest.json").write_bytes(manifest)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        load(folder, target_path, rows)


def test_shards_without_a_manifest_are_not_taken_for_whole(tmp_path, folder, target_path, rows):
    write(tmp_path / "other", target_path, rows)
    shuffled = [training_row(row.token_ids.flip(0)) for row in rows]
    write(folder, target_path, shuffled)
    (folder / "manifest.json").unlink()
    write(folder, target_path, rows)
    assert contents(folder) == contents(tmp_path / "other")


def test_too_little_disk_is_refused_before_anything_is_written(folder, target_path, rows, monkeypatch):
    num_bytes = sum(len(row.token_ids) for row in rows) * 32 * 4
    enough = num_bytes + cache_module.DISK_MARGIN
    for free, fits in ((enough - 1, False), (enough, True)):
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path, free=free: DiskUsage(free, 0, free))
        if fits:
            write(folder, target_path, rows)
            continue
        with pytest.raises(ValueError, match=f"{num_bytes:,} bytes .* {free:,} free"):
            write(folder, target_path, rows)
        assert contents(folder) == {}


def test_a_resumed_run_needs_disk_for_the_missing_shards_alone(folder, target_path, rows, monkeypatch):
    write(folder, target_path, rows)
    missing = shards(folder)[-1]
    num_bytes = load_file(missing)["hidden"].nbytes
    missing.unlink()
    free = num_bytes + cache_module.DISK_MARGIN
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: DiskUsage(free, 0, free))
    write(folder, target_path, rows)


def test_a_disk_that_fills_up_leaves_whole_files_alone(tmp_path, folder, target_path, rows, monkeypatch):
    write(tmp_path / "whole", target_path, rows)
    synced = []

    def full(descriptor):
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced.append(descriptor)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"hidden-00003\.safetensors.*No space left"):
        patch.setattr(os, "fsync", full)
        write(folder, target_path, rows)
    whole = contents(tmp_path / "whole")
    assert contents(folder) == {name: whole[name] for name in ("manifest.json", *sorted(whole)[:2])}
    write(folder, target_path, rows)
    assert contents(folder) == whole
