"""The compiled kernels, compared with their plain versions, and inside CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops.cases import DTYPES, UNTOUCHED, Moves, Shape, attend_with_xformers, make_case, make_moves
from vllm_ctc_spec.ops import reference
from vllm_ctc_spec.ops.triton.launch import chip_of, plan_launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SHAPE = Shape((64, 1, 0, 9), (700, 0, 30, 2100), 2, 4, 128, 16, torch.bfloat16, torch.bfloat16, 0.0, seed=1)


def planned(shape: Shape, num_splits: int):
    heads = shape.num_kv_heads * shape.group, shape.num_kv_heads, shape.head_size
    chip = chip_of(torch.device("cuda", 0))
    sizes = len(shape.num_rows), max(shape.num_rows), max(shape.context_lens)
    launch = plan_launch(*sizes, *heads, shape.dtype, chip)
    return replace(launch, num_splits=num_splits)


FEATURES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 100, "soft_cap": 1.5, "has_sinks": True},
    {"sliding_window": 5},
]


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_compiled_attention_equals_its_plain_twin(
    dtypes: tuple[torch.dtype, torch.dtype], head_size: int, features: dict[str, Any], num_splits: int
) -> None:
    from vllm_ctc_spec.ops.triton.attention import tree_attention

    if dtypes[1].itemsize == 1 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a float8 cache needs compute capability 8.9")
    shape = replace(SHAPE, dtype=dtypes[0], cache_dtype=dtypes[1], head_size=head_size, **features)
    make_case(shape, planned(shape, num_splits), "cuda").check(tree_attention)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_compiled_xformers_equals_its_plain_twin(dtype: torch.dtype, head_size: int) -> None:
    pytest.importorskip("xformers")
    sizes = {"num_rows": (64, 1, 9), "context_lens": (700, 30, 2100), "head_size": head_size}
    shape = replace(SHAPE, dtype=dtype, cache_dtype=dtype, **sizes)
    make_case(shape, planned(shape, 1), "cuda").check(attend_with_xformers)


def test_a_captured_step_reads_what_was_written_into_its_buffers() -> None:
    from vllm_ctc_spec.ops.triton.attention import tree_attention

    case = make_case(SHAPE, planned(SHAPE, 3), "cuda")
    out, batch = torch.empty_like(case.query), case.batch
    arguments = case.query, case.key, case.value, case.kv_cache, batch, case.scale
    torch.cuda.set_sync_debug_mode("error")
    try:
        tree_attention(*arguments, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree_attention(*arguments, out)
    case.query.normal_()
    batch.ancestor_masks.fill_(-1)
    batch.context_lens.copy_(batch.context_lens // 3)
    batch.num_rows.copy_(batch.num_rows // 2)
    out.fill_(UNTOUCHED)
    graph.replay()
    expected = reference.tree_attention(*arguments, torch.full_like(out, UNTOUCHED))
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("seed", range(5))
def test_the_compiled_move_equals_its_plain_twin(dtype: torch.dtype, seed: int) -> None:
    from vllm_ctc_spec.ops.triton.move import CacheTable, move_slots

    moves: Moves = make_moves(5, 40, 11, dtype, seed, "cuda")
    moves.check(lambda caches, sources, targets: move_slots(CacheTable.of(caches), sources, targets))
