"""The model runner on each of vLLM's devices: how drafting is prepared there."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ctc_spec.engine.cpu_modules import use_vllms_kernels
from vllm_ctc_spec.engine.graphs import capture_drafting
from vllm_ctc_spec.engine.runner import TreeModelRunner


class TreeGPUModelRunner(TreeModelRunner):
    """For vLLM's CUDA backend."""

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        super().profile_run(*args, **kwargs)
        # vLLM gives the remaining memory to the cache, so the peak of drafting must be part of its profile.
        self.drafter.profile(self.max_num_reqs)

    def warm_up_drafting(self) -> None:
        capture_drafting(self)


class TreeCPUModelRunner(TreeModelRunner, CPUModelRunner):
    """For vLLM's CPU backend."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.has_drafter:
            use_vllms_kernels(self.drafter.drafter, self.max_model_len)

    def warm_up_drafting(self) -> None:
        # The search for trees is compiled when it is first called.
        self.drafter.profile(1)
