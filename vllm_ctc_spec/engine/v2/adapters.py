"""LoRA adapters on Model Runner V2 with drafts."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.gpu.lora_utils import LoraState


class TreeLoraState(LoraState):
    """Which rows have which adapter: vLLM's has one row of logits for each request, and with drafts there are more."""

    num_logits: np.ndarray
    """[R] rows of logits of each request of the step, set before each step."""

    def make_lora_inputs(self, req_ids: list[str], idx_mapping: np.ndarray, num_scheduled_tokens: np.ndarray) -> Any:
        _, of_tokens, requests = super().make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)
        return tuple(self.lora_ids[idx_mapping].repeat(self.num_logits)), of_tokens, requests
