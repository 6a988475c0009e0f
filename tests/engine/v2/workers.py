"""Workers that count what Model Runner V2 does, with our kernels for CPU and for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan, NodeBudget
from vllm_ctc_spec.engine.v2.cpu_worker import CTCCPUWorkerV2

WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
}
"""Operations at which the host waits for a GPU, because it reads the result or its shape."""


class CountWaits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in WAITING:
            self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


class WatchedWorkerV2(CTCCPUWorkerV2):
    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        attention, verifier = self.model_runner.attention, self.model_runner.rejection_sampler
        self.seen = {"attention": type(attention).__name__}
        self.seen |= dict.fromkeys(("whole", "mixed", "moves", "at_once", "levels"), 0)
        attach, move = attention.attach_batch, attention.move
        at_once, levels = verifier._walk_at_once, verifier._walk_levels

        def watched_attach(metadata: Any, batch: Any, requests: Any, are_whole_step: bool) -> None:
            self.seen["whole" if are_whole_step else "mixed"] += 1
            attach(metadata, batch, requests, are_whole_step)

        def watched_move(group: int, sources: Any, targets: Any) -> None:
            self.seen["moves"] += int((sources >= 0).any())
            move(group, sources, targets)

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
        """The attention's class; counts of steps of trees alone, steps with other rows, K/V moves, walks of each kind.
        RuledWorkerV2 adds the nodes of each step and the number of steps before `mislead`.
        """
        return self.seen


class TritonWorkerV2(WatchedWorkerV2):
    """With vLLM's TRITON_ATTN backend and our Triton kernels, both interpreted."""

    def init_device(self) -> Any:
        import torch
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from vllm_ctc_spec.drafter import drafting
        from vllm_ctc_spec.engine.attention.triton import TreeTritonAttentionBackend as backend

        # vLLM's kernels choose tile sizes by it.
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        # Build trees as on a GPU.
        drafting.can_search = lambda table: False
        super().init_device()
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__name__}")

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.seen["waits"] = waits = []
        runner, speculator = self.model_runner, self.model_runner.speculator
        sample, propose = runner.sample, speculator.propose

        def counted(call: Any) -> Any:
            def counting(*args: Any, **kwargs: Any) -> Any:
                with CountWaits() as counter:
                    result = call(*args, **kwargs)
                waits.extend(counter.names)
                return result

            return counting

        runner.sample, speculator.propose = counted(sample), counted(propose)
        return times


class RuledWorkerV2(WatchedWorkerV2):
    """With an adaptive budget that follows a rule instead of measured times."""

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        speculator = self.model_runner.speculator
        self.seen["nodes"] = nodes = []
        self.decide(lambda step: None if step % 5 == 0 else float(step % 3 == 0))
        begin = speculator.trees.begin

        def watched_begin(batch: Any) -> None:
            nodes.append(batch.num_draft_tokens)
            begin(batch)

        speculator.trees.begin = watched_begin
        return times

    def decide(self, cost: Callable[[int], float | None]) -> None:
        """cost: of a node by step, in units of 0.3 tokens; None where nothing is drafted."""
        budget, steps = self.model_runner.speculator.budget, count()
        # Only the first rank has a budget.
        if budget is None:
            return

        def plan(num_requests: int) -> DraftPlan | None:
            chosen = cost(next(steps))
            # At so low a rate the time of rows costs nothing.
            return None if chosen is None else DraftPlan(num_requests, 1e-4 * chosen, 3e3)

        budget.control.budget.plan = plan

    def mislead(self) -> None:
        """From now on draft in every step, with each drafted token id increased by one."""
        drafter = self.model_runner.drafter
        draft, num_nodes = drafter.draft, drafter.settings.num_nodes

        def misled(*args: Any) -> Any:
            packed = draft(*args).clone()
            packed[:, :num_nodes] = (packed[:, :num_nodes] + 1) % drafter.drafter.config.vocab_size
            return packed

        drafter.draft = misled
        control = self.model_runner.speculator.budget.control
        # A new budget has no memory of earlier acceptance.
        control.budget = NodeBudget(control.budget._target, control.budget._drafting)
        self.decide(lambda step: 1.0)
        self.seen["useful_steps"] = len(self.seen["nodes"])
