"""A worker with the CUDA path on a CPU: vLLM's TRITON_ATTN backend and our kernels, in Triton's interpreter.

Needs TRITON_INTERPRET=1 in its environment: Triton decides when a kernel is defined whether it is interpreted.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_ctc_spec.drafter import drafting
from vllm_ctc_spec.engine.attention import choice
from vllm_ctc_spec.engine.cpu_worker import CTCCPUWorker
from vllm_ctc_spec.engine.graphs import Call
from vllm_ctc_spec.engine.walk import TreeWalker

MAX_CAPTURED_REQUESTS = 3
"""Requests; one fewer than the test serves, so that some steps draft without a captured graph."""

VLLMS_KERNELS = (
    "vllm.v1.attention.ops.triton_attention_helpers",
    "vllm.v1.attention.ops.triton_reshape_and_cache_flash",
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.v1.attention.backends.triton_attn",
)


def interpret_vllms_kernels() -> None:
    """Reload vLLM's kernels with Triton, for which vLLM has a placeholder on a CPU."""
    import triton
    from vllm import triton_utils

    assert os.environ.get("TRITON_INTERPRET") == "1"
    triton_utils.triton, triton_utils.tl = triton, triton.language
    for name in VLLMS_KERNELS:
        importlib.reload(importlib.import_module(name))
    _assume_a_gpu()


def allow_xformers_on_a_cpu() -> None:
    # xformers warns that its compiled parts need another torch; they are not used.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    from xformers.ops.fmha.triton_splitk import FwOp

    reasons = FwOp.not_supported_reasons.__func__

    def other_reasons(cls: type, inputs: Any) -> list[str]:
        """All reasons but the device and float32, in which answers are compared; on CUDA start-up refuses float32."""
        ours = ("device=cpu", "dtype=torch.float32", "bf16 is only supported on A100+")
        return [reason for reason in reasons(cls, inputs) if not reason.startswith(ours)]

    FwOp.not_supported_reasons = classmethod(other_reasons)
    _assume_a_gpu()


def _assume_a_gpu() -> None:
    """vLLM's and xformers' kernels choose tile sizes by the compute capability."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


class InterpretedWorker(CTCCPUWorker):
    kernel = "own"

    def init_device(self) -> Any:
        super().init_device()
        interpret_vllms_kernels()
        # Build trees as on a GPU.
        drafting.can_search = lambda table: False
        # After the reload, which replaces its base classes.
        from vllm_ctc_spec.engine.attention.triton import TreeTritonAttentionBackend as backend

        # On a CPU start-up refuses kernels for CUDA.
        chosen = choice.tree_attention_of
        choice.tree_attention_of = lambda layers, kernel: chosen(layers, self.kernel)
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__name__}")

    def determine_available_memory(self) -> int:
        # As the GPU's runner does while vLLM profiles memory, before there is a cache.
        self.model_runner.drafter.profile(self.model_runner.max_num_reqs)
        return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.seen = {"attention": type(self.model_runner.attention).__name__}
        self.seen |= dict.fromkeys(("whole", "mixed", "moves", "captured"), 0)
        self._watch(self.model_runner.attention)
        # In place of CUDA graphs: the same fixed buffers and padding, computed each time.
        self.model_runner.drafter.capture(MAX_CAPTURED_REQUESTS, self._watched)
        return times

    def _watched(self, call: Call) -> Call:
        def replay() -> Any:
            self.seen["captured"] += 1
            return call()

        return replay

    def _watch(self, attention: Any) -> None:
        attach, move = attention.attach, attention.move

        def watched_attach(metadata: Any, trees: Any) -> None:
            self.seen["whole" if trees.are_whole_step else "mixed"] += 1
            attach(metadata, trees)

        def watched_move(*args: Any) -> None:
            self.seen["moves"] += 1
            move(*args)

        attention.attach, attention.move = watched_attach, watched_move

    def sample_as_on_a_gpu(self) -> None:
        """From now on sample all nodes of a tree at once, with noise for the whole vocabulary."""
        sampler = self.model_runner.sampler
        sampler.topk_topp_sampler.forward = sampler.topk_topp_sampler.forward_native
        self.model_runner.walker = TreeWalker(sampler, at_once=True)

    def what_was_seen(self) -> dict[str, Any]:
        """The attention's class; counts of steps of trees alone, steps with other rows, K/V moves, captured drafts."""
        return self.seen


class XformersWorker(InterpretedWorker):
    kernel = "xformers"

    def init_device(self) -> Any:
        super().init_device()
        allow_xformers_on_a_cpu()
