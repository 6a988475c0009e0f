"""Launch parameters of the Triton kernels: every number that a measurement on a GPU may change stands here.

Letters: R requests, K key-value heads, G query heads per key-value head, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

MIN_TILES_PER_SPLIT = 4
"""Context tiles that a split reads at least: fewer are not worth its share of the merge."""
MIN_EFFICIENCY = 0.85
"""Fewest splits whose last wave of programs fills the chip this well, relative to the best number of splits."""
READ_COST = 32
"""Rows whose arithmetic takes about as long as reading a tile of keys and values once more from the L2 cache."""
MIN_STAGES, MAX_STAGES = 2, 3
"""Triton's pipeline depth. It takes three to load a tile while another is computed; two are for want of memory."""
MERGE_WARPS = 1
MOVE_WARPS = 4

RESERVED_SHARED_MEMORY = 8 * 1024
"""Bytes per program that Triton needs beside the tiles."""
ASSUMED_PROCESSORS, ASSUMED_SHARED_MEMORY = 132, 88 * 1024
"""Where there is no CUDA device to ask, as on a CPU that interprets the kernels."""


@dataclass(frozen=True)
class Launch:
    """How tree attention is launched. `benchmarks/gpu/kernel_check.py --tune` measures the alternatives."""

    block_m: int
    """Rows of a program, query heads folded in: at least G * rows, or a request takes several programs."""
    block_n: int
    """Context positions per tile."""
    num_warps: int
    num_stages: int
    """Depth of the pipeline of loads."""
    num_splits: int = 1
    """Parts of the context that are read side by side and merged."""


@lru_cache(maxsize=1024)
def plan_launch(
    num_requests: int,
    max_rows: int,
    max_context: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Launch:
    """Launch parameters for a shape. Reads no tensor; the same arguments always give the same answer.

    max_rows: rows of the largest request; max_context: the longest context that may ever come under this plan.
    """
    tile = plan_tile(max_rows * num_heads // num_kv_heads, head_size, dtype, _shared_memory(device))
    blocks = -(-max_rows * num_heads // num_kv_heads // tile.block_m)
    resident = _resident_programs(tile, device)
    num_splits = choose_num_splits(
        blocks * num_kv_heads * num_requests, resident, most_splits(tile, max_context, device)
    )
    return replace(tile, num_splits=num_splits)


def most_splits(tile: Launch, max_context: int, device: torch.device) -> int:
    """That any plan of this tile has, for contexts up to `max_context`."""
    return max(1, min(-(-max_context // (tile.block_n * MIN_TILES_PER_SPLIT)), _resident_programs(tile, device)))


def plan_tile(num_folded_rows: int, head_size: int, dtype: torch.dtype, shared_memory: int) -> Launch:
    """Tile sizes for G * rows folded rows, in `shared_memory` bytes per program."""
    row_bytes = next_power_of_2(head_size) * dtype.itemsize
    rows_at_hand = shared_memory // row_bytes
    is_small = row_bytes <= 256 and dtype.itemsize == 2
    block_n = 64 if is_small else 32
    while block_n > 16 and 64 + 2 * MAX_STAGES * block_n > rows_at_hand:
        block_n //= 2
    sizes = (128, 64, 32, 16) if is_small else (64, 32, 16)
    fitting = [block_m for block_m in sizes if block_m + 2 * MIN_STAGES * block_n <= rows_at_hand]
    block_m = min(fitting, key=lambda block_m: -(-num_folded_rows // block_m) * (block_m + READ_COST))
    num_stages = min(MAX_STAGES, (rows_at_hand - block_m) // (2 * block_n))
    num_warps = 8 if block_m * next_power_of_2(head_size) >= 128 * 128 else 4
    return Launch(block_m, block_n, num_warps, num_stages)


def choose_num_splits(num_programs: int, num_resident: int, max_splits: int) -> int:
    """Fewest splits that fill the chip: the rule of FlashAttention's `num_splits_heuristic` (Dao, 2023).

    num_programs: without splits; num_resident: programs that run at a time.
    """

    def efficiency(num_splits: int) -> float:
        waves = num_programs * num_splits / num_resident
        return waves / -(-num_programs * num_splits // num_resident)

    candidates = range(1, max_splits + 1)
    best = max(map(efficiency, candidates))
    return next(splits for splits in candidates if efficiency(splits) >= MIN_EFFICIENCY * best)


def _resident_programs(tile: Launch, device: torch.device) -> int:
    if device.type != "cuda":
        return ASSUMED_PROCESSORS
    per_processor = 1 if tile.num_warps == 8 else 2
    return per_processor * torch.cuda.get_device_properties(device).multi_processor_count


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may use, less what Triton needs beside the tiles."""
    if device.type != "cuda":
        return ASSUMED_SHARED_MEMORY
    # torch's type stubs do not know the field, torch does.
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - RESERVED_SHARED_MEMORY


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
