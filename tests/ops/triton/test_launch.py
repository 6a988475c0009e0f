"""Launch parameters fit the chip and fill it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ctc_spec.ops.triton.launch import (
    MIN_EFFICIENCY,
    MIN_TILES_PER_SPLIT,
    chip_of,
    choose_num_splits,
    plan_launch,
    plan_tile,
)

KIB = 1024


@given(
    st.integers(1, 64 * 16),
    st.integers(4, 16).map(lambda sixteenths: 16 * sixteenths),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([91 * KIB, 155 * KIB, 219 * KIB]),
)
def test_tiles_fit_into_shared_memory_and_the_pipeline_is_full(
    num_folded_rows: int, head_size: int, dtype: torch.dtype, shared_memory: int
) -> None:
    tile = plan_tile(num_folded_rows, head_size, dtype, shared_memory)
    row_bytes = (1 << (head_size - 1).bit_length()) * dtype.itemsize
    assert (tile.block_m + 2 * tile.num_stages * tile.block_n) * row_bytes <= shared_memory
    assert tile.num_stages == 3 or row_bytes == 1024
    assert tile.block_m >= 16 and tile.block_n >= 16


@given(st.integers(1, 2000), st.integers(1, 300), st.integers(1, 500))
def test_no_other_number_of_splits_fills_the_chip_much_better(programs: int, resident: int, max_splits: int) -> None:
    def filled(num_splits: int) -> float:
        return programs * num_splits / resident / math.ceil(programs * num_splits / resident)

    chosen = choose_num_splits(programs, resident, max_splits)
    assert 1 <= chosen <= max_splits
    assert all(filled(chosen) >= MIN_EFFICIENCY * filled(other) for other in range(1, max_splits + 1))


@pytest.mark.parametrize("max_rows", [1, 33, 64])
def test_one_long_request_is_split_and_a_short_one_is_not(max_rows: int) -> None:
    shape = (32, 1, 128, torch.bfloat16, chip_of(torch.device("cpu")))
    long = plan_launch(1, max_rows, 1 << 17, *shape)
    assert long.num_splits > 1
    short = plan_launch(1, max_rows, MIN_TILES_PER_SPLIT * long.block_n, *shape)
    assert short.num_splits == 1
