"""The worker: installs our attention backends and builds our runner, each in place of vLLM's.

Nothing here may import vllm.v1.worker.cpu_worker, which replaces parts of torch for a process without a GPU.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker import gpu_input_batch, gpu_model_runner
from vllm.v1.worker.gpu_worker import Worker

from vllm_ctc_spec.engine.device_runners import TreeGPUModelRunner
from vllm_ctc_spec.engine.logits_processors import build_logitsprocs
from vllm_ctc_spec.engine.settings import EngineSettings, check_final
from vllm_ctc_spec.engine.thinking_budgets import thinking_budgets

logger = init_logger("vllm.ctc_spec")


def summary(settings: EngineSettings, num_frames: int, runner: str, adapts: bool) -> str:
    """The one line that says what serves: vLLM knows the method as a class of somebody's."""
    nodes = f"{'up to ' * adapts}{settings.num_nodes} nodes per request"
    sources = [f"drafter {settings.drafter}, {num_frames} frames"] if settings.drafter else ["no drafter"]
    if settings.options.retrieves:
        sources.append(f"retrieval {settings.options.retrieval}")
    return f'Speculative method "ctc": {", ".join(sources)}, {settings.options.tree} tree of {nodes}, {runner}'


class CTCWorker(Worker):
    """What does not depend on the device."""

    def init_device(self) -> Any:
        check_final(self.vllm_config)
        # Looked up in their modules when vLLM builds the runner; this process serves only us.
        gpu_model_runner.build_logitsprocs = build_logitsprocs
        gpu_input_batch.maybe_create_thinking_budget_state_holder = thinking_budgets
        return super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.drafter.warm_up_attention()
        self.model_runner.warm_up_drafting()
        self.model_runner.measure_step_cost()
        runner, drafter = self.model_runner, self.model_runner.drafter
        # By one of the ranks.
        logger.info_once(summary(drafter.settings, drafter.num_frames, type(runner).__name__, runner.adapts))
        return times


class CTCGPUWorker(CTCWorker):
    def init_device(self) -> Any:
        # Not above, because the CPU's worker has this one as its base and needs no Triton.
        from vllm_ctc_spec.engine.attention import triton

        triton.register()
        return super().init_device()

    def _make_model_runner(self) -> TreeGPUModelRunner:
        return TreeGPUModelRunner(self.vllm_config, self.device)
