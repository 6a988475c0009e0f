"""The tree-attention kernels, compared with their plain version in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import DTYPES, Shape, make_case, shapes
from vllm_ctc_spec.ops.triton.attention import tree_attention
from vllm_ctc_spec.ops.triton.launch import Launch

SMALL = Shape((5, 3), (70, 33), 2, 2, 64, 16, torch.float32, torch.float32, 0.0, seed=1)


def launches(num_splits: st.SearchStrategy[int]) -> st.SearchStrategy[Launch]:
    return st.builds(Launch, st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.just(4), st.just(2), num_splits)


@settings(max_examples=24, deadline=None)
@given(shapes(DTYPES), launches(st.integers(1, 5)))
def test_ragged_batches_of_trees_attend_to_their_contexts_and_ancestors(shape: Shape, launch: Launch) -> None:
    make_case(shape, launch).check(tree_attention)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_all_sixty_four_rows_are_told_apart(num_splits: int) -> None:
    shape = replace(SMALL, num_rows=(64,), context_lens=(20,), num_kv_heads=1)
    case = make_case(shape, Launch(64, 32, 4, 2, num_splits))
    last = int(case.batch.row_starts[0]) + 63
    assert (case.batch.ancestor_masks < 0).any(), "bit 63 is the sign"
    case.check(tree_attention)
    changed = case.value.clone()
    changed[last] += 1
    out, other = case.run(tree_attention), replace(case, value=changed).run(tree_attention)
    sees_last = case.batch.ancestor_masks < 0
    assert torch.equal((out != other).any(-1).any(-1), sees_last)


def test_a_row_that_sees_nothing_is_zero() -> None:
    case = make_case(replace(SMALL, context_lens=(0, 0)), Launch(16, 32, 4, 2, 2))
    blind = replace(case.batch, ancestor_masks=torch.zeros_like(case.batch.ancestor_masks))
    case = replace(case, batch=blind)
    start = int(blind.row_starts[0])
    assert not case.run(tree_attention)[start : start + 5].any()
    case.check(tree_attention)


def test_large_logits_overflow_nowhere() -> None:
    case = make_case(SMALL, Launch(16, 16, 4, 2, 3))
    replace(case, scale=300.0).check(tree_attention)
    replace(case, scale=300.0, soft_cap=20.0).check(tree_attention)


def test_windows_of_long_contexts_are_split() -> None:
    shape = replace(SMALL, context_lens=(1000, 300), sliding_window=500, has_sinks=True)
    for num_splits in (1, 3, 40):
        make_case(shape, Launch(16, 16, 4, 2, num_splits, min_tiles=2)).check(tree_attention)


def test_places_beyond_two_billion_elements_are_reached() -> None:
    shape = replace(SMALL, context_lens=(33, 10), num_kv_heads=1, cache_dtype=torch.float8_e4m3fn)
    case = make_case(shape, Launch(16, 32, 4, 2))
    near = case.kv_cache
    # Memory that is never touched costs nothing. The last of five blocks starts at 2^31.
    far = torch.empty((len(near) - 1 << 29) + near[0].numel(), dtype=near.dtype)
    far = far.as_strided(near.shape, (1 << 29, *near[0].contiguous().stride()))
    far.copy_(near)
    assert torch.equal(replace(case, kv_cache=far).run(tree_attention), case.run(tree_attention))
