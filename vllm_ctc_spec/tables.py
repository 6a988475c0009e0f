"""Tables: the console that prints them, and Markdown for reports and model cards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console

PIPED_WIDTH = 400
"""Columns. A pipe or a file has no width, and rich would cut tables to 80."""


def console() -> Console:
    """For stdout."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
