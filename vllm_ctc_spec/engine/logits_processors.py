"""vLLM's logits processors, all of them.

With any speculation vLLM loads only min_tokens and refuses custom processors
(vllm/v1/sample/logits_processor/__init__.py), because its rejection sampler sees several positions at once.
Our walk runs the sampler one position at a time, so every processor works as in plain decoding.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from vllm.v1.sample import logits_processor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import LogitsProcessors


def build_logitsprocs(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> LogitsProcessors:
    plain_config = copy.copy(vllm_config)
    plain_config.speculative_config = None
    return logits_processor.build_logitsprocs(plain_config, *args, **kwargs)
