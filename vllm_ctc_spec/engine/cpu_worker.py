"""The worker for vLLM's CPU backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ctc_spec.engine.attention import cpu as cpu_attention
from vllm_ctc_spec.engine.device_runners import TreeCPUModelRunner
from vllm_ctc_spec.engine.worker import CTCWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class CTCCPUWorker(CTCWorker, CPUWorker):
    def init_device(self) -> Any:
        cpu_attention.register()
        # Looked up in its module when vLLM builds the runner; this process serves only us.
        cpu_worker.CPUModelRunner = TreeCPUModelRunner
        return super().init_device()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        output = super().execute_model(scheduler_output)
        if output is None and not scheduler_output.has_structured_output_requests:
            # vLLM's engine would only send a message to say so.
            output = self.sample_tokens(None)
        return output

    def sample_tokens(self, *args: Any) -> Any:
        output = super().sample_tokens(*args)
        # For `CTCExecutor`.
        output.draft_token_ids = self.take_draft_token_ids()
        return output
