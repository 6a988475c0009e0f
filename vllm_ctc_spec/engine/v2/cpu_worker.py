"""Model Runner V2 on vLLM's CPU backend, where Triton interprets V2's kernels: for tests, not to serve."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu import model_runner as cpu_model_runner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ctc_spec.engine.attention import cpu as cpu_attention
from vllm_ctc_spec.engine.v2.runner import TreeCPUModelRunnerV2
from vllm_ctc_spec.engine.v2.worker import CTCWorkerV2


class CTCCPUWorkerV2(CTCWorkerV2, CPUWorker):
    def init_device(self) -> Any:
        cpu_attention.register()
        # Looked up in its module when vLLM builds the runner; this process serves only us.
        cpu_model_runner.CPUModelRunner = TreeCPUModelRunnerV2
        return super().init_device()
