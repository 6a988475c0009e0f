"""The worker for vLLM's CPU backend."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ctc_spec.engine.attention import cpu as cpu_attention
from vllm_ctc_spec.engine.runner import TreeCPUModelRunner
from vllm_ctc_spec.engine.worker import CTCWorker


class CTCCPUWorker(CTCWorker, CPUWorker):
    def init_device(self) -> Any:
        cpu_attention.register()
        # Looked up in its module when vLLM builds the runner; this process serves only us.
        cpu_worker.CPUModelRunner = TreeCPUModelRunner
        return super().init_device()

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        # For `CTCExecutor`.
        output.draft_token_ids = self.take_draft_token_ids()
        return output
