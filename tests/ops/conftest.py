"""Triton decides at its import whether kernels are interpreted, so these tests run in a separate process."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
