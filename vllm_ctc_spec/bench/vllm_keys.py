"""Options that go to vLLM as they are, checked by name before an engine starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_ctc_spec.bench.config import check_ctc
from vllm_ctc_spec.config import did_you_mean
from vllm_ctc_spec.engine.vllm_api import engine_options, speculative_options


def check_engine_keys(where: str, options: Iterable[str]) -> None:
    """Raises ValueError that names an option that `vllm.LLM` does not have."""
    known = engine_options()
    for key in options:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}: vllm.LLM has no such option.{did_you_mean(key, known)}")


def check_speculative_keys(where: str, config: dict[str, Any]) -> None:
    """Raises ValueError that names what is wrong in a `speculative_config`."""
    if config.get("method") == "ctc":
        check_ctc(where, config)
        return
    known = speculative_options()
    for key in config:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in {where}: vLLM's speculative_config has none.{did_you_mean(key, known)}"
            )
