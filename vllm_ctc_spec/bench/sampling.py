"""How the requests of a cell are sampled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    """1: all tokens."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def file_part(self) -> str:
        return str(self).replace(", ", "-").replace(" ", "")

    def __str__(self) -> str:
        """temperature 0.2, top-p 0.9"""
        return f"temperature {self.temperature:g}" + (f", top-p {self.top_p:g}" if self.top_p < 1 else "")
