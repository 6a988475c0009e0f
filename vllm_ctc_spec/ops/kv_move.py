"""Keys and values of accepted nodes move to consecutive slots: every layer in one Triton launch.

A layer's cache is found through a table of addresses, made once. The plain twin is `ops.reference.move_slots`.

Letters: R requests, P places of a path, L layers, K key-value heads, B block size, D head size.
"""

# Triton reads the kernels' annotations as types of its own, so they cannot be typed for mypy.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ctc_spec.ops.launch import MOVE_WARPS

WORD = torch.int32
"""Bytes move as words of this type, whatever the cache holds."""
NUM_PLACES = 16
"""Of a path, that one compiled kernel is for: no drafter has more frames."""


@dataclass(frozen=True)
class CacheTable:
    """Where the caches of L layers lie. All have one shape, dtype and stride, and live at least as long as this."""

    kv_caches: tuple[Tensor, ...]
    """L tensors [blocks, K, B, 2 * D]; kept so that the addresses stay good."""
    addresses: Tensor
    """[L] int64"""

    @classmethod
    def of(cls, kv_caches: list[Tensor]) -> CacheTable:
        """A cache that several layers share counts once. Raises ValueError for caches that differ."""
        unique = tuple({kv_cache.data_ptr(): kv_cache for kv_cache in kv_caches}.values())
        layouts = {(kv_cache.shape[1:], kv_cache.stride(), kv_cache.dtype) for kv_cache in unique}
        if len(layouts) > 1:
            raise ValueError(
                f"the layers' caches differ in shape, stride or dtype: {sorted(map(str, layouts))}. Accepted keys and "
                f"values move in one launch for all layers: serve a target whose layers are alike."
            )
        addresses = torch.tensor([kv_cache.data_ptr() for kv_cache in unique], dtype=torch.int64)
        if any(kv_cache.data_ptr() % 16 for kv_cache in unique):
            raise ValueError(f"a layer's cache does not start at a multiple of 16 bytes: {addresses.tolist()}.")
        return cls(unique, addresses.to(unique[0].device))


def move_slots(table: CacheTable, sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values of slot sources[r, p] to slot targets[r, p], in every layer.

    sources, targets: [R, P] int64, slot = block * B + place in the block; a source of -1 moves nothing. A request reads
    all of its sources before it writes, so they may overlap with its own targets, not with those of another request.
    """
    first = table.kv_caches[0]
    _, num_kv_heads, block_size, packed = first.shape
    words_per_element = first.dtype.itemsize / WORD.itemsize
    num_requests, num_places = sources.shape
    row_words = int(packed * words_per_element)
    _move_kernel[(num_kv_heads, num_requests, len(table.kv_caches))](
        table.addresses,
        sources,
        targets,
        *(int(stride * words_per_element) for stride in first.stride()[:3]),
        sources.stride(0),
        targets.stride(0),
        num_places,
        BLOCK_SIZE=block_size,
        ROW_WORDS=row_words,
        BLOCK_P=max(NUM_PLACES, triton.next_power_of_2(num_places)),
        BLOCK_W=triton.next_power_of_2(row_words),
        num_warps=MOVE_WARPS,
    )


# One kernel for all steps, whatever their sizes and however their tensors are aligned.
@triton.jit(do_not_specialize=["sources_ptr", "targets_ptr", "sources_row", "targets_row", "num_places"])
def _move_kernel(
    addresses_ptr,
    sources_ptr,
    targets_ptr,
    cache_block: tl.int64,
    cache_head: tl.int64,
    cache_slot: tl.int64,
    sources_row,
    targets_row,
    num_places,
    BLOCK_SIZE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    request = tl.program_id(1)
    places = tl.arange(0, BLOCK_P)
    sources = tl.load(sources_ptr + request * sources_row + places, mask=places < num_places, other=-1)
    moves = sources >= 0
    if tl.max(moves.to(tl.int32), 0) == 0:
        return
    targets = tl.load(targets_ptr + request * targets_row + places, mask=moves, other=0)
    address = tl.load(addresses_ptr + tl.program_id(2)).to(tl.pointer_type(tl.int32))
    cache_ptr = tl.multiple_of(address, 16) + tl.program_id(0) * cache_head
    words = tl.arange(0, BLOCK_W)
    from_words = (sources // BLOCK_SIZE) * cache_block + (sources % BLOCK_SIZE) * cache_slot
    to_words = (targets // BLOCK_SIZE) * cache_block + (targets % BLOCK_SIZE) * cache_slot
    exists = moves[:, None] & (words < ROW_WORDS)[None, :]
    moved = tl.load(cache_ptr + from_words[:, None] + words[None, :], mask=exists)
    # A slot may be both source and target, in the hands of different threads.
    tl.debug_barrier()
    tl.store(cache_ptr + to_words[:, None] + words[None, :], moved, mask=exists)
