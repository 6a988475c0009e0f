"""Checks names of options before an engine starts: those of `vllm.LLM` and of `speculative_config`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_ctc_spec.config import SpecOptions, check_node_budget, did_you_mean, goes_without_drafter
from vllm_ctc_spec.engine.vllm_api import engine_options, speculative_options


def check_engine_keys(where: str, options: Iterable[str]) -> None:
    """Raises ValueError that names the first option that `vllm.LLM` does not have. where: setting to name in it."""
    known = engine_options()
    for key in options:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}: vllm.LLM has no such option.{did_you_mean(key, known)}")


def check_speculative_keys(where: str, config: dict[str, Any], target: str) -> None:
    """Raises ValueError if a `speculative_config` has an unknown key or, for our method, an unusable value."""
    if config.get("method") == "ctc":
        check_ctc(where, config, target)
        return
    known = speculative_options()
    for key in config:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in {where}: vLLM's speculative_config has none.{did_you_mean(key, known)}"
            )


def check_ctc(where: str, spec: dict[str, Any], target: str) -> None:
    """Raises ValueError if a `speculative_config` of our method has an unknown key or an unusable value or drafter."""
    from vllm_ctc_spec.drafter.checkpoint import check_drafter
    from vllm_ctc_spec.drafter.lookup import find_drafter

    theirs = ("method", "model", "revision", "num_speculative_tokens")
    own = {key: value for key, value in spec.items() if key not in theirs}
    try:
        SpecOptions.from_dict(own)
        if "num_speculative_tokens" in spec:
            check_node_budget(spec["num_speculative_tokens"])
        if not goes_without_drafter(spec):
            check_drafter(find_drafter(spec.get("model"), target, spec.get("revision")))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
