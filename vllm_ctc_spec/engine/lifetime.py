"""An engine whose processes are gone when the block ends."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm import LLM


@contextmanager
def started(model: str, **options: Any) -> Iterator[LLM]:
    """`vllm.LLM(model, **options)`. Dropping the object alone leaves its processes to the garbage collector."""
    llm = LLM(model, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
