"""The workers that run Model Runner V2."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu import model_runner

from vllm_ctc_spec.engine.v2.runner import TreeModelRunnerV2
from vllm_ctc_spec.engine.v2.speculator import CTCSpeculator
from vllm_ctc_spec.engine.worker import CTCGPUWorker, CTCWorker


def _speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> CTCSpeculator:
    return CTCSpeculator(vllm_config, device)


class CTCWorkerV2(CTCWorker):
    """What does not depend on the device."""

    def init_device(self) -> Any:
        # Looked up in its module when vLLM builds the runner; this process serves only us.
        model_runner.init_speculator = _speculator
        return super().init_device()


class CTCGPUWorkerV2(CTCWorkerV2, CTCGPUWorker):
    def _make_model_runner(self) -> Any:
        return TreeModelRunnerV2(self.vllm_config, self.device)
