"""Tables: the console that prints them, and Markdown for reports and model cards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console

PIPED_WIDTH = 400
"""Columns of a stdout that is no terminal. rich would assume 80 and cut tables."""


def console() -> Console:
    """A console for stdout that does not cut tables in a pipe."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
