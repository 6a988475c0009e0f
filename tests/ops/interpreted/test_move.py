"""The K/V move, compared with its plain version."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests.ops.cases import Moves, make_moves, random_moves
from vllm_ctc_spec.ops.triton.move import CacheTable, move_slots


def move(kv_caches: list[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
    move_slots(CacheTable.of(kv_caches), sources, targets)


@settings(max_examples=25, deadline=None)
@given(random_moves([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]))
def test_every_layer_moves_alike_and_reads_before_it_writes(moves: Moves) -> None:
    moves.check(move)


def test_an_accepted_path_lands_in_consecutive_slots() -> None:
    moves = make_moves(1, 1, 2, torch.float32, seed=0)
    before = moves.kv_caches[0].clone()
    move(moves.kv_caches, torch.tensor([[2, 5, -1]]), torch.tensor([[1, 2, 3]]))
    after = moves.kv_caches[0]
    assert torch.equal(after[0, :, 1], before[0, :, 2])
    assert torch.equal(after[0, :, 2], before[0, :, 5])
    assert torch.equal(after[0, :, 3:], before[0, :, 3:])


def test_slot_zero_moves_like_any_other() -> None:
    moves = make_moves(1, 1, 2, torch.float32, seed=0)
    before = moves.kv_caches[0].clone()
    move(moves.kv_caches, torch.tensor([[0, 3]]), torch.tensor([[3, 0]]))
    assert torch.equal(moves.kv_caches[0][0, :, [0, 3]], before[0, :, [3, 0]])


def test_layers_that_share_a_cache_move_once() -> None:
    moves = make_moves(2, 1, 6, torch.float16, seed=3)
    Moves(moves.kv_caches, moves.sources, moves.targets).check(
        lambda caches, sources, targets: move([*caches, *caches], sources, targets)
    )


def test_layers_that_differ_are_refused() -> None:
    caches = [torch.zeros(2, 1, 16, 128), torch.zeros(2, 1, 32, 128)]
    with pytest.raises(ValueError, match="differ"):
        CacheTable.of(caches)
