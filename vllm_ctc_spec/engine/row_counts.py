"""Numbers of rows that kernels exist for.

oneDNN makes its product of two matrices anew for each number of rows, which takes some 20 ms for all layers of a small
target, and vLLM records CUDA graphs for some numbers only. So those that we choose ourselves are few: four in each
doubling.
"""

from __future__ import annotations


def row_counts(most: int) -> list[int]:
    """1, 2, ... 8, 10, ... 16, 20, ... 32, 40 and so on, and `most`."""
    counts = [1]
    while (last := counts[-1]) < most:
        counts.append(min(last + max(1, (1 << last.bit_length()) // 8), most))
    return counts


def doublings(most: int) -> list[int]:
    """1, 2, 4, ... at most `most`."""
    return [1 << power for power in range(most.bit_length())]
