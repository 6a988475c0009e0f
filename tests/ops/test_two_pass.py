"""The GPU benchmark's alternative, attention to the context and the rows in two passes, against the plain version."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.attention_steps import Step, make_step
from benchmarks.gpu.kernel_check import exact_attention
from benchmarks.gpu.two_pass import Dense, cudnn, flash, plain, two_pass

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def check(step: Step, dense: Dense) -> None:
    found = two_pass(step, dense)().flatten(0, 1)
    torch.testing.assert_close(found.double(), exact_attention(step), rtol=0, atol=TOLERANCE[step.query.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_rows", "context"), [(1, 1), (9, 40), (33, 70), (64, 16)])
def test_two_passes_attend_to_contexts_and_ancestors(num_rows: int, context: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_rows)
    with torch.compiler.set_stance("force_eager"):
        check(make_step((num_rows,) * 2, (context,) * 2, dtype, device="cpu"), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dense", [flash, cudnn])
@pytest.mark.parametrize(("num_rows", "context"), [(1, 1000), (9, 4000), (33, 70), (64, 160)])
def test_the_libraries_kernels_return_the_log_sum_exp_that_the_merge_needs(
    num_rows: int, context: int, dense: Dense
) -> None:
    check(make_step((num_rows,) * 2, (context,) * 2), dense)
