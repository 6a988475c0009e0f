"""The plain twin against the CPU backend's attention, which was written apart from it."""

from __future__ import annotations

import torch

from tests.ops.cases import UNTOUCHED, Shape, make_case
from vllm_ctc_spec.ops.launch import Launch
from vllm_ctc_spec.ops.reference import attend_with_bias, tail_bias, tree_attention, unpack_ancestor_masks

LENGTH, ROWS = 32, 9


def test_both_read_the_same_masks_and_tables_alike() -> None:
    shape = Shape((ROWS, ROWS), (LENGTH, LENGTH), 2, 3, 64, 16, torch.float32, torch.float32, 0.0, seed=5)
    case = make_case(shape, Launch(16, 16, 4, 2))
    batch = case.batch
    rows = batch.row_starts[:, None].long() + torch.arange(ROWS)
    cached = case.kv_cache[batch.block_table.long()].transpose(1, 2).flatten(2, 3)
    keys, values = (
        torch.cat((half, own[rows].transpose(1, 2)), dim=2)
        for half, own in zip(cached.split(64, dim=-1), (case.key, case.value))
    )
    allowed = unpack_ancestor_masks(batch.ancestor_masks[rows], ROWS)
    bias = tail_bias(batch.context_lens.long(), LENGTH, allowed, 3, torch.float32)
    expected = torch.full_like(case.query, UNTOUCHED)
    expected[rows] = attend_with_bias(case.query[rows], keys, values, bias, case.scale)
    torch.testing.assert_close(case.run(tree_attention), expected, rtol=0, atol=1e-5)
