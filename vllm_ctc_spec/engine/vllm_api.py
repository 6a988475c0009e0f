"""What the commands need of vLLM beside its public `LLM` and `SamplingParams`."""

from __future__ import annotations

import dataclasses
from typing import Any


def engine_options() -> list[str]:
    """The names that `vllm.LLM` takes."""
    from vllm.engine.arg_utils import EngineArgs

    return [each.name for each in dataclasses.fields(EngineArgs)]


def speculative_options() -> list[str]:
    """The keys of vLLM's own `speculative_config`."""
    from vllm.config import SpeculativeConfig

    return [each.name for each in dataclasses.fields(SpeculativeConfig)]


def one_output_per_step() -> Any:
    """For `SamplingParams(output_kind=...)`: outputs hold what is new."""
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.DELTA


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises where it refuses a request."""
    from vllm.exceptions import VLLMClientError

    return ValueError, VLLMClientError
