"""Where tables are printed."""

from __future__ import annotations

import sys

from rich.console import Console

PIPED_WIDTH = 400
"""Columns. A pipe or a file has no width, and rich would cut tables to 80."""


def console() -> Console:
    """For stdout."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
