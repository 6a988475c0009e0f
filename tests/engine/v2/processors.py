"""The logits processor of tests/engine/processors.py for Model Runner V2."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor


class AvoidRepeat(LogitsProcessor):
    """Bans the request's last token."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.states = req_states

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return True

    def apply_staged_writes(self) -> None:
        return None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        slots = ctx.expanded_idx_mapping.long()
        last = self.states.all_token_ids.gpu[slots, self.states.total_len.gpu[slots].long() - 1].long()
        return logits.scatter(1, last[:, None], float("-inf"))
