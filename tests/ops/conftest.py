"""Triton decides when it is imported whether kernels are interpreted, so the tests that need it run by themselves."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
