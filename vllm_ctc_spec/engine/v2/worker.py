"""The workers that run Model Runner V2."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu_worker import Worker

from vllm_ctc_spec.engine.settings import check_final
from vllm_ctc_spec.engine.v2.runner import TreeModelRunnerV2
from vllm_ctc_spec.engine.v2.speculator import CTCSpeculator
from vllm_ctc_spec.engine.worker import log_summary


def _speculator(vllm_config: VllmConfig, device: torch.device, req_states: Any) -> CTCSpeculator:
    return CTCSpeculator(vllm_config, device)


class CTCWorkerV2(Worker):
    """What does not depend on the device."""

    def init_device(self) -> Any:
        check_final(self.vllm_config)
        # Looked up in its module when vLLM builds the runner; this process serves only us.
        model_runner.init_speculator = _speculator
        return super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.drafter.warm_up_attention()
        self.model_runner.warm_up_drafting()
        self.model_runner.measure_step_cost()
        log_summary(self.model_runner, adapts=self.model_runner.speculator.adapts)
        return times


class CTCGPUWorkerV2(CTCWorkerV2):
    def init_device(self) -> Any:
        # Not above, because the CPU's worker has this one as its base.
        from vllm_ctc_spec.engine.attention import triton

        triton.register()
        return super().init_device()

    def _make_model_runner(self) -> TreeModelRunnerV2:
        return TreeModelRunnerV2(self.vllm_config, self.device)
