"""Launch parameters of the Triton kernels. Every number that a measurement on a GPU may change is in this file.

Letters: R requests, K key-value heads, G query heads per key-value head, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch

MIN_TILES_PER_SPLIT = 4
"""Fewest context tiles that a split reads: the merge of more splits costs more than they save."""
MIN_EFFICIENCY = 0.85
"""Of all numbers of splits, the smallest is chosen whose last wave of programs fills the chip at least this well,
relative to the best."""
READ_COST = 32
"""Number of rows whose arithmetic takes as long as reading a tile of keys and values once more from the L2 cache."""
MIN_STAGES, MAX_STAGES = 2, 3
"""Depth of Triton's pipeline of loads. With three, a tile is loaded while another is computed; two save memory."""
MERGE_WARPS = 1
MOVE_WARPS = 4

RESERVED_SHARED_MEMORY = 8 * 1024
"""Bytes per program that Triton needs beside the tiles."""


@dataclass(frozen=True)
class Chip:
    """What the plan depends on."""

    num_processors: int
    """Streaming multiprocessors"""
    shared_memory: int
    """Bytes per program that CUDA allows at most (opt-in)."""


HOPPER = Chip(132, 227 * 1024)
"""H100 SXM and H200 (CUDA C++ Programming Guide, technical specifications; NVIDIA's data sheets)."""
ASSUMED = Chip(132, 96 * 1024)
"""Where there is no CUDA device, as on a CPU that interprets the kernels."""


@dataclass(frozen=True)
class Launch:
    """How tree attention is launched. `benchmarks/gpu/kernel_check.py --tune` measures the alternatives."""

    block_m: int
    """Rows of a program, with the G query heads of a key-value head as rows of their own."""
    block_n: int
    """Context positions per tile."""
    num_warps: int
    num_stages: int
    """Depth of the pipeline of loads."""
    num_splits: int = 1
    """Parts of the context that different programs read at the same time, and that are then merged."""
    min_tiles: int = MIN_TILES_PER_SPLIT
    """Fewest context tiles that a split reads; short contexts therefore use fewer splits than `num_splits`."""


@lru_cache(maxsize=1024)
def plan_launch(
    num_requests: int,
    max_rows: int,
    max_context: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    chip: Chip,
) -> Launch:
    """Launch parameters for a shape. Reads no tensor, and equal arguments give equal results.

    max_rows: rows of the largest request; max_context: the longest context that may be served with this plan; chip: see
    `chip_of`, or one that need not be present.
    """
    folded_rows = max_rows * num_heads // num_kv_heads
    tile = plan_tile(folded_rows, head_size, dtype, chip.shared_memory - RESERVED_SHARED_MEMORY)
    programs = -(-folded_rows // tile.block_m) * num_kv_heads * num_requests
    num_splits = choose_num_splits(programs, resident_programs(tile, chip), most_splits(tile, max_context, chip))
    return replace(tile, num_splits=num_splits)


def most_splits(tile: Launch, max_context: int, chip: Chip) -> int:
    """The largest number of splits in any plan with this tile, for contexts up to `max_context`."""
    return max(1, min(-(-max_context // (tile.block_n * tile.min_tiles)), resident_programs(tile, chip)))


def splits_of_window(launch: Launch, sliding_window: int) -> int:
    """Splits of the launch that have tiles to read in layers with a window; sliding_window: 0 for none."""
    if not sliding_window:
        return launch.num_splits
    # One more where the window begins inside of a tile, and one for the step's own keys.
    num_tiles = -(-sliding_window // launch.block_n) + 2
    return min(launch.num_splits, -(-num_tiles // launch.min_tiles))


def plan_tile(num_folded_rows: int, head_size: int, dtype: torch.dtype, shared_memory: int) -> Launch:
    """Tile sizes for G * rows folded rows that need at most `shared_memory` bytes per program."""
    row_bytes = next_power_of_2(head_size) * dtype.itemsize
    rows_that_fit = shared_memory // row_bytes
    is_small = row_bytes <= 256 and dtype.itemsize == 2
    block_n = 64 if is_small else 32
    while block_n > 16 and 64 + 2 * MAX_STAGES * block_n > rows_that_fit:
        block_n //= 2
    sizes = (128, 64, 32, 16) if is_small else (64, 32, 16)
    fitting = [block_m for block_m in sizes if block_m + 2 * MIN_STAGES * block_n <= rows_that_fit]
    block_m = min(fitting, key=lambda block_m: -(-num_folded_rows // block_m) * (block_m + READ_COST))
    num_stages = min(MAX_STAGES, (rows_that_fit - block_m) // (2 * block_n))
    num_warps = 8 if block_m * next_power_of_2(head_size) >= 128 * 128 else 4
    return Launch(block_m, block_n, num_warps, num_stages)


def choose_num_splits(num_programs: int, num_resident: int, max_splits: int) -> int:
    """Fewest splits that fill the chip: the rule of FlashAttention's `num_splits_heuristic` (Dao, 2023).

    num_programs: without splits; num_resident: programs that run at the same time.
    """

    def efficiency(num_splits: int) -> float:
        waves = num_programs * num_splits / num_resident
        return waves / -(-num_programs * num_splits // num_resident)

    candidates = range(1, max_splits + 1)
    best = max(map(efficiency, candidates))
    return next(splits for splits in candidates if efficiency(splits) >= MIN_EFFICIENCY * best)


def candidates(planned: Launch) -> Iterator[Launch]:
    """Launches to measure against each other: the planned one, which is the fallback, then others around it.

    Some need more shared memory or registers than a chip has, and fail when they are launched.
    """
    yield planned
    split_counts = sorted({planned.num_splits, 2 * planned.num_splits})
    tiles = product(((32, 4), (64, 4), (128, 8)), (32, 64, 128), (3, 4), split_counts)
    for (block_m, num_warps), block_n, num_stages, num_splits in tiles:
        # A split reads at least as many positions as in the plan, or half as many.
        min_tiles = max(1, planned.min_tiles * planned.block_n * planned.num_splits // (block_n * num_splits))
        launch = Launch(block_m, block_n, num_warps, num_stages, num_splits, min_tiles)
        if launch != planned:
            yield launch


def resident_programs(tile: Launch, chip: Chip) -> int:
    """Programs of attention that run at the same time on the whole chip."""
    per_processor = 1 if tile.num_warps == 8 else 2
    return per_processor * chip.num_processors


def chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return ASSUMED
    # torch's type stubs lack the field.
    properties: Any = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
