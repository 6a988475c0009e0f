"""Numbers of rows that kernels exist for.

oneDNN makes its product of two matrices anew for each number of rows, which takes some 20 ms for all layers of a small
target, and vLLM records CUDA graphs for some numbers only. So those that we choose ourselves are few: four in each
doubling.
"""

from __future__ import annotations


def round_up_rows(num_rows: int) -> int:
    """The next of 1, 2, ... 8, 10, ... 16, 20, ... 32, 40 and so on."""
    step = max(1, (1 << (num_rows - 1).bit_length()) // 8)
    return -(-num_rows // step) * step


def row_counts(most: int) -> list[int]:
    """All of them up to `most`, and `most` itself."""
    counts = [1]
    while counts[-1] < most:
        counts.append(min(round_up_rows(counts[-1] + 1), most))
    return counts
