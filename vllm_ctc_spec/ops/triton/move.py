"""Moves keys and values of accepted nodes to consecutive slots, in all layers with one Triton launch.

The kernel finds the layers' caches through a table of addresses that is made once. The plain twin is
`ops.reference.move_slots`.

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

from vllm_ctc_spec.ops.triton.launch import MOVE_WARPS

WORD = torch.int32
"""The cache is copied in words of this type, whatever its dtype."""
NUM_PLACES = 16
"""Paths of up to this many places share one compiled kernel; drafters have fewer frames."""


@dataclass(frozen=True)
class CacheTable:
    """Addresses of the caches of L layers, which have equal shapes, dtypes and strides."""

    kv_caches: tuple[Tensor, ...]
    """L tensors [blocks, K, B, 2 * D]; held so that the addresses stay valid."""
    addresses: Tensor
    """[L] int64"""

    @classmethod
    def of(cls, kv_caches: list[Tensor]) -> CacheTable:
        """Caches that several layers share are moved once. Raises ValueError if the layers' caches differ."""
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
    """Copy keys and values from slot sources[r, p] to slot targets[r, p], in every layer.

    sources, targets: [R, P] int64, slot = block * B + offset in the block; a source of -1 is skipped. All sources of a
    request are read before its targets are written, so these may overlap. Slots of different requests may not.
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


# Not specialized, so that one compiled kernel serves all sizes and alignments.
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
    # One thread's target may be another thread's source.
    tl.debug_barrier()
    tl.store(cache_ptr + to_words[:, None] + words[None, :], moved, mask=exists)
