"""How much faster, and how sure: paired over rounds, on the logarithm of the ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    mean: float
    """Geometric mean over rounds."""
    low: float
    high: float
    """Ends of the confidence interval."""


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """values[i] and baseline[i] are of the same round, both > 0, at least two rounds.

    Student's t interval on log(values / baseline): ratios multiply, so their logarithms add, and what disturbs a
    whole round disturbs both of its values.
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    logs = [math.log(value / base) for value, base in zip(values, baseline, strict=True)]
    mean = statistics.fmean(logs)
    margin = t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))
