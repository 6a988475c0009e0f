"""The CPU's kernels against their plain twins."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import Case, Moves, Shape, make_case, random_moves, shapes
from vllm_ctc_spec.ops import cpu_kernels
from vllm_ctc_spec.ops.tree_batch import TreeBatch

DTYPES = [(dtype, dtype) for dtype in cpu_kernels.DTYPES]


def as_on_a_cpu(kv_cache: Tensor, is_tiled: bool) -> Tensor:
    """A copy that is laid out as vLLM's CPU backend has it."""
    made = torch.empty_like(kv_cache, memory_format=torch.contiguous_format)
    key, value = kv_cache.chunk(2, dim=-1)
    for half, own in zip(cpu_kernels.split_cache(made, is_tiled), (key.mT, value)):
        half.copy_(own.reshape(half.shape))
    return made


def move(kv_caches: list[Tensor], sources: Tensor, targets: Tensor, is_tiled: bool) -> None:
    moved = [as_on_a_cpu(kv_cache, is_tiled) for kv_cache in kv_caches]
    cpu_kernels.move_slots(moved, is_tiled, sources[sources >= 0], targets[sources >= 0])
    for kv_cache, now in zip(kv_caches, moved):
        keys, values = (half.flatten(4).flatten(2, 3) for half in cpu_kernels.split_cache(now, is_tiled))
        kv_cache.copy_(torch.cat((keys.mT, values), dim=-1))


def check(shape: Shape, is_tiled: bool, query_scale: float = 1.0) -> None:
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        batch: TreeBatch,
        scale: float,
        out: Tensor,
        **_: None,
    ) -> Tensor:
        return cpu_kernels.tree_attention(
            query, key, value, as_on_a_cpu(kv_cache, is_tiled), is_tiled, batch, scale, out
        )

    case: Case = make_case(replace(shape, softcap=0.0), launch=None)
    replace(case, query=query_scale * case.query).check(attend)


@settings(max_examples=150, deadline=None)
@given(shapes(DTYPES), st.booleans())
def test_rows_attend_to_their_context_and_ancestors(shape: Shape, is_tiled: bool) -> None:
    check(shape, is_tiled)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES)
def test_the_context_may_be_split_between_cores(dtype: torch.dtype, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        shape = Shape((33, 1, 0, 64), (700, 1, 90, 1030), 1, 3, 64, 32, dtype, dtype, 0.0, seed=num_threads)
        check(shape, is_tiled=dtype == torch.bfloat16)
    finally:
        torch.set_num_threads(before)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    shape = Shape((9, 17), (100, 0), 2, 2, 64, 16, torch.float32, torch.float32, 0.0, seed=1)
    check(shape, is_tiled=False, query_scale=60)


@settings(max_examples=50, deadline=None)
@given(random_moves(list(cpu_kernels.DTYPES)), st.booleans())
def test_every_layer_moves_alike_and_reads_before_it_writes(moves: Moves, is_tiled: bool) -> None:
    moves.check(partial(move, is_tiled=is_tiled))


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_kernels.kernels.cache_clear()
    with pytest.raises(RuntimeError, match=r"'no-such-compiler' failed: .*Install g\+\+"):
        cpu_kernels.kernels()
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="'false' failed"):
        cpu_kernels.kernels()
