"""Seconds by size: of the target by rows, of drafting by requests. Measured at start-up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vllm_ctc_spec.engine.row_counts import doublings, row_counts

MOST_ROWS, MOST_DRAFTING = 512, 64
"""Rows and requests that are measured at most."""

ALWAYS = (1, 8, 32)
"""Sizes that are measured however long they take."""

LONGEST_SWEEP = 2.0
"""Seconds of one run of every size; when they are spent, no larger size is taken in."""

NUM_SWEEPS = 3
"""Of which the fastest run of each size counts; a first one, which makes kernels, does not."""


@dataclass(frozen=True)
class Cost:
    sizes: np.ndarray
    """[n] increasing"""
    seconds: np.ndarray
    """[n]"""

    def at(self, sizes: Any) -> Any:
        """Seconds at `sizes`, elementwise: linear between measurements, and beyond them as over the last doubling."""
        return np.interp(sizes, self.sizes, self.seconds) + self._slope * np.maximum(sizes - self.sizes[-1], 0)

    @cached_property
    def _slope(self) -> float:
        # Not between the last two, whose difference is often smaller than their noise.
        half = max(int(np.searchsorted(self.sizes, self.sizes[-1] / 2, side="right")) - 1, 0)
        if half == len(self.sizes) - 1:
            return 0.0
        rise = self.seconds[-1] - self.seconds[half]
        return max(float(rise / (self.sizes[-1] - self.sizes[half])), 0.0)


def measure(seconds_of: Callable[[int], float], sizes: list[int], in_lock_step: bool = False) -> Cost:
    """Of `sizes` in increasing order those of ALWAYS, and others until a sweep takes LONGEST_SWEEP.

    seconds_of: runs a size. in_lock_step: all sizes, because other processes must run it exactly as often.
    A larger size may be faster: with AMX some products of 8 rows are faster than those of 4.
    """
    taken, spent = [], 0.0
    for size in sizes:
        if in_lock_step or size in ALWAYS or spent < LONGEST_SWEEP:
            taken.append(size)
            spent += seconds_of(size)
    sweeps = [[seconds_of(size) for size in taken] for _ in range(NUM_SWEEPS)]
    return Cost(np.array(taken), np.array(sweeps).min(0))


def timed(run: Callable[[int], object]) -> Callable[[int], float]:
    def seconds_of(size: int) -> float:
        started = time.perf_counter()
        run(size)
        return time.perf_counter() - started

    return seconds_of


def target_sizes(max_rows: int) -> list[int]:
    return row_counts(min(max_rows, MOST_ROWS))


def drafting_sizes(max_requests: int) -> list[int]:
    return doublings(min(max_requests, MOST_DRAFTING))
