from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops  # noqa: F401  (loads vLLM's kernels)
from vllm.platforms import current_platform
from vllm.utils.cpu_triton_utils import _expand_kernel_impl
from vllm.v1.sample import rejection_sampler

from vllm_ctc_spec.engine.cpu_sampling import mend

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's kernels for a CPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_each_drafted_row_gets_what_its_request_asks_for(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Three requests with one, no and three drafted rows; greedy counts as temperature 1."""
    settings, ends = torch.tensor([0, 3, 5], dtype=dtype), torch.tensor([1, 1, 4], dtype=torch.int32)
    expected = torch.tensor([1, 5, 5, 5], dtype=dtype)
    rows = torch.full_like(expected, 7)
    _expand_kernel_impl(rows, settings, ends, 0, 1)
    # vLLM's kernel leaves the rows as they are. Once it fills them, `mend` can go.
    assert rows.tolist() == [7, 7, 7, 7]
    # So that what `mend` replaces is restored after the test.
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", rejection_sampler.expand_batch_to_tokens)
    mend()
    torch.testing.assert_close(rejection_sampler.expand_batch_to_tokens(settings, ends, 4, 0, 1), expected)
