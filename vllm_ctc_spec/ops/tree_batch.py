"""The tree rows of a step, with their contexts and ancestor masks. Made once per step and used by all layers.

Letters: R requests, M query rows of the whole step, B block size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_ctc_spec.ops.triton.launch import Launch

MAX_ROWS = 64
"""Most rows of a request, because a row's ancestor mask is an int64 with one bit per row."""


@dataclass(frozen=True)
class TreeBatch:
    """The tree rows of one step.

    Everything but the tensors' contents depends on shapes only, so a captured CUDA graph can be replayed after the
    tensors were overwritten in place.
    """

    row_starts: Tensor
    """[R] int32, index of each request's first row in the M rows of the step."""
    num_rows: Tensor
    """[R] int32, rows of each request, at most `max_rows`; requests with 0 (padding, prefill) are skipped."""
    ancestor_masks: Tensor
    """[M] int64, bit j is set if the row sees row j of its request. For a sliding window, a row's depth below its
    request's first row is one less than the number of its bits."""
    context_lens: Tensor
    """[R] int32, number of each request's positions in the cache. Its rows see all of them, or their windows."""
    block_table: Tensor
    """[R, blocks] int32, entry i is the cache block of positions i * B to (i + 1) * B - 1."""
    max_rows: int
    """Upper bound of `num_rows`, at most MAX_ROWS."""
    launch: Launch | None = None
    """From `ops.triton.launch.plan_launch`; only the Triton kernels use it."""
