"""Drafting captured over fixed buffers: on a GPU one CUDA graph for each padded number of requests.

From the target's hidden states to packed trees no step waits for the host and all shapes are fixed. It takes about a
hundred small launches, which a graph replays as one.

Letters: R requests, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import graph_capture

from vllm_ctc_spec.engine.attention.interface import PagedContext
from vllm_ctc_spec.engine.row_counts import doublings

MAX_CAPTURED_REQUESTS = 32
"""A graph keeps its memory, and drafting for a larger batch is not bound by launches."""

Call = Callable[[], Tensor]
Capture = Callable[[Call], Call]
"""Returns a call that repeats the work of the given one on the memory that it used."""


@dataclass(frozen=True)
class DraftInputs:
    """All that the trees of R requests depend on beside the drafter's cache."""

    last_tokens: Tensor
    """[R, 2] int64, the token of the last verified position and the anchor."""
    hidden: Tensor
    """[R, H], the target's hidden states of the last verified positions."""
    context: PagedContext

    def first(self, count: int) -> DraftInputs:
        """Views of the first requests."""
        context = PagedContext(self.context.block_table[:count], self.context.lens[:count])
        return DraftInputs(self.last_tokens[:count], self.hidden[:count], context)


class DraftGraphs:
    """`draft` for at most as many requests as `buffers` hold, padded to the next captured number of requests."""

    def __init__(self, draft: Callable[[DraftInputs], Tensor], buffers: DraftInputs, capture: Capture) -> None:
        self._buffers = buffers
        most = len(buffers.hidden)
        sizes = sorted({most, *doublings(most)})
        # The largest first: the others share its memory.
        self._replays = {size: capture(partial(draft, buffers.first(size))) for size in reversed(sizes)}

    def __call__(self, inputs: DraftInputs) -> Tensor:
        """[R, ...], valid until the next call."""
        count = len(inputs.hidden)
        own = self._buffers.first(count)
        own.last_tokens.copy_(inputs.last_tokens)
        own.hidden.copy_(inputs.hidden)
        own.context.lens.copy_(inputs.context.lens)
        own.context.block_table[:, : inputs.context.block_table.shape[1]] = inputs.context.block_table
        # Rows of padding hold an earlier request's inputs; their trees are cut off.
        return self._replays[min(size for size in self._replays if size >= count)]()[:count]

    def fits(self, inputs: DraftInputs) -> bool:
        return len(inputs.hidden) <= len(self._buffers.hidden)


def capture_drafting(runner: Any) -> None:
    """In CUDA graphs, unless the user turned graphs off. runner: one of ours."""
    if runner.compilation_config.cudagraph_mode.has_piecewise_cudagraphs():
        # Lets vLLM record the sums over ranks.
        recording = partial(graph_capture, runner.device)
        runner.drafter.capture(min(runner.max_num_reqs, MAX_CAPTURED_REQUESTS), cuda_graphs(recording))


def cuda_graphs(recording: Callable[[], AbstractContextManager[Any]]) -> Capture:
    """Captures into CUDA graphs that share one pool of memory, each in a context of `recording`."""
    pool = torch.cuda.graph_pool_handle()

    def capture(call: Call) -> Call:
        # Kernels are compiled at their first launch, which must not happen during capture.
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with recording(), torch.cuda.graph(graph, pool=pool):
            output = call()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return capture
