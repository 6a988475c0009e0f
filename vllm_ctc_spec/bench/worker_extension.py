"""Runs inside vLLM's worker process (`worker_extension_cls`): times the stages of a decoding step, reads GPU memory.

vLLM mixes it into the worker class of every method, so that all run the same worker. It does nothing until called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_ctc_spec.engine.cpu_sampling import mend

STAGES = ("draft", "build", "verify", "walk", "K/V move")


class BenchWorkerExtension:
    model_runner: Any
    model_config: Any

    def bench_mend_sampling(self) -> None:
        mend()

    def bench_set_logprobs_mode(self, mode: str | None) -> None:
        """Set vLLM's `logprobs_mode` for the requests from now on; None: the engine's own setting."""
        self.model_runner.sampler.logprobs_mode = mode or self.model_config.logprobs_mode

    def bench_start_clock(self) -> None:
        """Time the stages of every step from now on. CTC methods only."""
        runner = self.model_runner
        self.bench_clock = StageClock()
        timed = (
            (runner, "_model_forward", "verify"),
            (runner, "walker", "walk"),
            (runner, "_move_accepted", "K/V move"),
            (runner.drafter, "propose", "draft"),
            # Counted as part of "draft" where both are one CUDA graph.
            (runner.drafter, "_build", "build"),
        )
        for owner, name, stage in timed:
            try:
                self.bench_clock.time(owner, name, stage)
            except AttributeError:
                self.bench_clock.remove()
                raise

    def bench_stop_clock(self) -> dict[str, float]:
        """Stop timing, and return the median milliseconds of each stage since `bench_start_clock`."""
        self.bench_clock.remove()
        times = self.bench_clock.median_ms()
        return {stage: times[stage] for stage in STAGES}

    def bench_reset_memory(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def bench_peak_memory(self) -> int:
        """Most bytes that torch had allocated on the GPU since `bench_reset_memory`; 0 without a GPU."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


class StageClock:
    """Replaces methods of objects by timed ones until `remove`.

    The time of a stage that runs inside another one (the proposer builds trees while it drafts) counts for the inner
    stage only.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._undo: list[Callable[[], None]] = []
        self._inner: list[float] = []
        """For each running stage, outermost first: seconds of the stages that ran inside it."""

    def time(self, owner: Any, name: str, stage: str) -> None:
        inner, is_own = getattr(owner, name), name in vars(owner)
        seconds = self._seconds.setdefault(stage, [])

        def outer(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = _now()
            try:
                return inner(*args, **kwargs)
            finally:
                passed = _now() - started
                seconds.append(passed - self._inner.pop())
                if self._inner:
                    self._inner[-1] += passed

        setattr(owner, name, outer)
        self._undo.append(lambda: setattr(owner, name, inner) if is_own else delattr(owner, name))

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def median_ms(self) -> dict[str, float]:
        return {stage: 1e3 * statistics.median(times or [0.0]) for stage, times in self._seconds.items()}


def _now() -> float:
    # On a GPU a stage ends when its kernels end, not when they are launched.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
