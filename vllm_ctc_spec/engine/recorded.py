"""Drafting as recorded passes over fixed buffers: on a GPU one CUDA graph for each padded number of requests.

From the target's hidden states to packed trees nothing waits for the host and all shapes are fixed, but it takes some
hundred small launches; a graph makes them one. Letters: R requests, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_ctc_spec.engine.attention.interface import PagedContext
from vllm_ctc_spec.engine.row_counts import doublings

MOST_RECORDED = 32
"""Of a recorded pass, whose memory is held for good; a larger batch fills the GPU without graphs."""

Call = Callable[[], Tensor]
Record = Callable[[Call], Call]
"""From a call to one that does the same work on the same memory."""


@dataclass(frozen=True)
class DraftInputs:
    """What the trees of R requests are a function of, beside the drafter's cache."""

    last_tokens: Tensor
    """[R, 2] int64, the token of the last verified position and the anchor."""
    hidden: Tensor
    """[R, H], the target's hidden states of the last verified positions."""
    context: PagedContext

    def first(self, count: int) -> DraftInputs:
        """Views of the first requests."""
        context = PagedContext(self.context.block_table[:count], self.context.lens[:count])
        return DraftInputs(self.last_tokens[:count], self.hidden[:count], context)


class RecordedDrafts:
    """`draft` for at most as many requests as `buffers` are for, padded to the next of a few recorded numbers."""

    def __init__(self, draft: Callable[[DraftInputs], Tensor], buffers: DraftInputs, record: Record) -> None:
        self._buffers = buffers
        most = len(buffers.hidden)
        sizes = sorted({most, *doublings(most)})
        # From the largest on, whose memory the others can share.
        self._replays = {size: record(partial(draft, buffers.first(size))) for size in reversed(sizes)}

    def __call__(self, inputs: DraftInputs) -> Tensor:
        """[R, ...] of the R requests, to be read before the next call."""
        count = len(inputs.hidden)
        own = self._buffers.first(count)
        own.last_tokens.copy_(inputs.last_tokens)
        own.hidden.copy_(inputs.hidden)
        own.context.lens.copy_(inputs.context.lens)
        own.context.block_table[:, : inputs.context.block_table.shape[1]] = inputs.context.block_table
        # What stands in the rows of padding is some earlier request's, and so are the trees that come of it.
        return self._replays[min(size for size in self._replays if size >= count)]()[:count]

    def takes(self, inputs: DraftInputs) -> bool:
        return len(inputs.hidden) <= len(self._buffers.hidden)


def cuda_graphs() -> Record:
    """All in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(call: Call) -> Call:
        # Kernels are compiled at their first launch, which a capture cannot hold.
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = call()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return record
