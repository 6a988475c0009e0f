"""The worker: installs our attention backend and builds our runner, each in place of vLLM's."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker import cpu_worker, gpu_model_runner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ctc_spec.engine.attention import cpu as cpu_attention
from vllm_ctc_spec.engine.logits_processors import build_logitsprocs
from vllm_ctc_spec.engine.runner import TreeCPUModelRunner


class CTCCPUWorker(CPUWorker):
    def init_device(self) -> Any:
        cpu_attention.register()
        # Both names are looked up in their modules when vLLM builds the runner; this process serves only us.
        gpu_model_runner.build_logitsprocs = build_logitsprocs
        cpu_worker.CPUModelRunner = TreeCPUModelRunner
        return super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.measure_step_cost()
        return times
