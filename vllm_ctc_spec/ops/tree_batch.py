"""What tree attention knows about a step: which rows, which context, who sees whom. Made once for all layers.

Letters: R requests, M query rows of the whole step, B block size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_ctc_spec.ops.launch import Launch

MAX_ROWS = 64
"""Rows of a request: one bit of an int64 each."""


@dataclass(frozen=True)
class TreeBatch:
    """The tree rows of one step.

    All fields but the tensors' contents are fixed by shapes, so that a captured CUDA graph may hold the tensors and
    be replayed after they were overwritten in place.
    """

    row_starts: Tensor
    """[R] int32, index of each request's first row among the M rows of the step."""
    num_rows: Tensor
    """[R] int32, rows of each request, at most `max_rows`; 0 skips a request (padding, or a prefill beside it)."""
    ancestor_masks: Tensor
    """[M] int64, bit j: the row sees row j of its own request."""
    context_lens: Tensor
    """[R] int32, positions of each request that lie in the cache and that all its rows see."""
    block_table: Tensor
    """[R, blocks] int32, cache block of positions i * B to (i + 1) * B - 1."""
    max_rows: int
    """Upper bound of `num_rows`, at most MAX_ROWS."""
    launch: Launch | None = None
    """How the Triton kernels are launched, from ops.launch.plan_launch; of no use to others."""
