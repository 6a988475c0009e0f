"""vLLM's rejection sampler on a CPU, mended: without it other methods would be measured on noise.

It gives each drafted row the temperature, top-k and top-p of its request. vLLM 0.32's kernel for a CPU writes them into
a copy that nobody reads (`_expand_kernel_impl` of vllm/utils/cpu_triton_utils.py, unless they are int64), and logits
are divided by whatever was in memory. Greedy requests, plain vLLM and ours do not come through there. Goes when vLLM
has mended it, of which tests/engine/test_cpu_sampling.py tells.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mend() -> None:
    """In a worker's process; does nothing where vLLM does not run on a CPU."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """As vLLM's: x[r], or what replaces it, for each drafted row of request r. x, cu_num_tokens: [R] -> [num_tokens]"""
    num_rows = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(num_rows, output_size=num_tokens)
