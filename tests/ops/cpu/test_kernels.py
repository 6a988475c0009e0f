"""The CPU's kernels, compared with their plain versions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import Case, Moves, Shape, make_case, random_moves, shapes
from vllm_ctc_spec.ops.cpu import kernels
from vllm_ctc_spec.ops.tree_batch import TreeBatch

DTYPES = [(dtype, dtype) for dtype in kernels.DTYPES]
BFLOAT16 = [(torch.bfloat16, torch.bfloat16)]


def as_on_a_cpu(kv_cache: Tensor, is_tiled: bool) -> Tensor:
    """A copy that is laid out as vLLM's CPU backend has it."""
    made = torch.empty_like(kv_cache, memory_format=torch.contiguous_format)
    key, value = kv_cache.chunk(2, dim=-1)
    for half, own in zip(kernels.split_cache(made, is_tiled), (key.mT, value)):
        half.copy_(own.reshape(half.shape))
    return made


def move(kv_caches: list[Tensor], sources: Tensor, targets: Tensor, is_tiled: bool) -> None:
    moved = [as_on_a_cpu(kv_cache, is_tiled) for kv_cache in kv_caches]
    kernels.move_slots(moved, is_tiled, sources[sources >= 0], targets[sources >= 0])
    for kv_cache, now in zip(kv_caches, moved):
        keys, values = kernels.joined_cache(now, is_tiled)
        kv_cache.copy_(torch.cat((keys.mT, values), dim=-1))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    batch: TreeBatch,
    scale: float,
    out: Tensor,
    is_tiled: bool,
    k_scale: None,
    v_scale: None,
    **features: Any,
) -> Tensor:
    cache = as_on_a_cpu(kv_cache, is_tiled)
    return kernels.tree_attention(query, key, value, cache, is_tiled, batch, scale, out, **features)


def check(shape: Shape, is_tiled: bool = False, query_scale: float = 1.0) -> None:
    case: Case = make_case(shape, launch=None)
    replace(case, query=query_scale * case.query).check(partial(attend, is_tiled=is_tiled))


@pytest.fixture(scope="module")
def amx() -> None:
    if not kernels.multiplies_tiles():
        pytest.skip("needs a processor with AMX in bfloat16")
    # In an engine the plugin asks for it.
    torch.cpu._init_amx()


@settings(max_examples=150, deadline=None)
@given(shapes(DTYPES))
def test_rows_attend_to_their_context_and_ancestors(shape: Shape) -> None:
    check(shape)


@pytest.mark.usefixtures("amx")
@settings(max_examples=150, deadline=None)
@given(shapes(BFLOAT16), st.sampled_from([32, 64, 96, 128]), st.sampled_from([32, 64, 96]))
def test_rows_attend_by_amx(shape: Shape, head_size: int, block_size: int) -> None:
    check(replace(shape, head_size=head_size, block_size=block_size), is_tiled=True)


def check_split(dtype: torch.dtype, num_threads: int, is_tiled: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        shape = Shape((33, 1, 0, 64), (700, 1, 90, 1030), 1, 3, 64, 32, dtype, dtype, 0.0, seed=num_threads)
        check(shape, is_tiled)
        check(replace(shape, sliding_window=200, soft_cap=1.5, has_sinks=True), is_tiled)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_the_context_may_be_split_between_cores(dtype: torch.dtype, num_threads: int) -> None:
    check_split(dtype, num_threads, is_tiled=False)


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_context_may_be_split_between_cores_by_amx(num_threads: int) -> None:
    check_split(torch.bfloat16, num_threads, is_tiled=True)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    shape = Shape((9, 17), (100, 0), 2, 2, 64, 16, torch.float32, torch.float32, 0.0, seed=1)
    check(shape, query_scale=60)
    check(replace(shape, soft_cap=20.0), query_scale=60)


@settings(max_examples=50, deadline=None)
@given(random_moves(list(kernels.DTYPES)), st.booleans())
def test_every_layer_moves_alike_and_reads_before_it_writes(moves: Moves, is_tiled: bool) -> None:
    moves.check(partial(move, is_tiled=is_tiled))


def test_a_change_in_any_source_or_header_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(kernels.FOLDER, tmp_path, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    keys = [kernels._cache_key("g++"), kernels._cache_key("clang++")]
    sources = [path for path in tmp_path.iterdir() if path.suffix != ".py"]
    for path in sources:
        path.write_text(path.read_text() + "// changed\n")
        keys.append(kernels._cache_key("g++"))
    assert {path.suffix for path in sources} == {".cpp", ".h"}
    assert len(set(keys)) == 2 + len(sources)


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.kernels.cache_clear()
    with pytest.raises(RuntimeError, match=r"'no-such-compiler' failed: .*Install g\+\+"):
        kernels.kernels()
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="'false' failed"):
        kernels.kernels()
