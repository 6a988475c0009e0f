"""Captured drafting gives each request the drafts that it gets alone, whatever the buffers held before."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from vllm_ctc_spec.engine.attention.interface import PagedContext
from vllm_ctc_spec.engine.graphs import Call, DraftGraphs, DraftInputs, cuda_graphs

MOST, BLOCKS = 5, 4


def inputs(num_requests: int, num_blocks: int, seed: int = 0, device: str = "cpu") -> DraftInputs:
    torch.manual_seed(seed)
    table = torch.randint(9, (num_requests, num_blocks), dtype=torch.int32)
    context = PagedContext(table.to(device), torch.randint(1, 4 * num_blocks, (num_requests,)).int().to(device))
    tokens, hidden = torch.randint(100, (num_requests, 2)), torch.randn(num_requests, 3)
    return DraftInputs(tokens.to(device), hidden.to(device), context)


def draft(inputs: DraftInputs) -> Tensor:
    """A function of all that drafting may read of a request: of its table only the blocks of its context."""
    table, lens = inputs.context.block_table, inputs.context.lens
    is_read = torch.arange(table.shape[1], device=lens.device) < (lens[:, None] + 3) // 4
    read = (table * is_read).sum(1)
    return torch.stack((inputs.last_tokens.sum(1) + read + lens, inputs.hidden.sum(1).mul(1e6).long()), dim=1)


def test_each_batch_is_padded_to_the_next_captured_size() -> None:
    sizes = []

    def record(call: Call) -> Call:
        def replay() -> Tensor:
            sizes.append(len(output := call()))
            return output

        return replay

    captured = DraftGraphs(draft, inputs(MOST, BLOCKS), record)
    for seed, (count, num_blocks) in enumerate([(5, 4), (1, 1), (3, 2), (4, 4), (2, 3)]):
        batch = inputs(count, num_blocks, seed)
        assert captured.fits(batch)
        assert torch.equal(captured(batch), draft(batch))
    assert sizes == [5, 1, 4, 4, 2]
    assert not captured.fits(inputs(MOST + 1, BLOCKS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_graphs_read_the_current_contents_of_their_buffers() -> None:
    captured = DraftGraphs(draft, inputs(MOST, BLOCKS, device="cuda"), cuda_graphs(nullcontext))
    for seed, count in enumerate([5, 1, 3, 5, 2]):
        batch = inputs(count, BLOCKS, seed, "cuda")
        assert torch.equal(captured(batch), draft(batch))
