"""Tree attention by xformers, whose kernels are interpreted too, compared with its plain version in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from tests.ops.cases import Shape, attend_with_xformers, make_case, shapes
from vllm_ctc_spec.ops.triton.launch import Launch

DTYPES = [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)]


@pytest.fixture(scope="module", autouse=True)
def xformers_on_a_cpu() -> None:
    from tests.engine.interpreted import allow_xformers_on_a_cpu

    allow_xformers_on_a_cpu()


@settings(max_examples=12, deadline=None)
@given(shapes(DTYPES))
def test_ragged_batches_of_trees_attend_to_their_contexts_and_ancestors(shape: Shape) -> None:
    some = {
        "num_rows": tuple(max(1, rows) for rows in shape.num_rows),
        "context_lens": tuple(max(1, length) for length in shape.context_lens),
        "head_size": 64 if shape.head_size == 80 else shape.head_size,
        "soft_cap": 0.0,
        "sliding_window": 0,
        "has_sinks": False,
    }
    make_case(replace(shape, **some), Launch(16, 16, 4, 2)).check(attend_with_xformers)


def test_long_contexts_are_split() -> None:
    shape = Shape((20, 3), (1100, 30), 2, 2, 64, 16, torch.float16, torch.float16, 0.0, seed=3)
    make_case(shape, Launch(16, 16, 4, 2)).check(attend_with_xformers)
