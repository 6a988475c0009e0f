"""Workers that tell what a run of Model Runner V2 went through, with our kernels for CPU and with those for a GPU."""

from __future__ import annotations

from typing import Any

from vllm_ctc_spec.engine.v2.cpu_worker import CTCCPUWorkerV2


class WatchedWorkerV2(CTCCPUWorkerV2):
    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        attention, verifier = self.model_runner.attention, self.model_runner.rejection_sampler
        self.seen = {"attention": type(attention).__name__}
        self.seen |= dict.fromkeys(("whole", "mixed", "moves", "at_once", "levels"), 0)
        attach, move = attention.attach_batch, attention.move
        at_once, levels = verifier._walk_at_once, verifier._walk_levels

        def watched_attach(metadata: Any, batch: Any, are_whole_step: bool) -> None:
            self.seen["whole" if are_whole_step else "mixed"] += 1
            attach(metadata, batch, are_whole_step)

        def watched_move(sources: Any, targets: Any) -> None:
            self.seen["moves"] += int((sources >= 0).any())
            move(sources, targets)

        def watched_at_once(*args: Any) -> Any:
            self.seen["at_once"] += 1
            return at_once(*args)

        def watched_levels(*args: Any) -> Any:
            self.seen["levels"] += 1
            return levels(*args)

        attention.attach_batch, attention.move = watched_attach, watched_move
        verifier._walk_at_once, verifier._walk_levels = watched_at_once, watched_levels
        return times

    def what_was_seen(self) -> dict[str, Any]:
        """The class that attends; steps of trees alone, of other rows beside trees; K/V moves; kinds of walks."""
        return self.seen


class TritonWorkerV2(WatchedWorkerV2):
    """With vLLM's TRITON_ATTN backend and our Triton kernels, which are interpreted, too."""

    def init_device(self) -> Any:
        import torch
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from vllm_ctc_spec.drafter import drafting
        from vllm_ctc_spec.engine.attention.triton import TreeTritonAttentionBackend as backend

        # vLLM's kernels choose tile sizes by it.
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        # Trees are built as on a GPU.
        drafting.can_search = lambda table: False
        super().init_device()
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__name__}")
