"""Plain vLLM and vLLM with our method, in separate processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_ctc_spec.bench.processes import MethodFailed, MethodProcess
from vllm_ctc_spec.demo.pair import Pair
from vllm_ctc_spec.kv_cache import kv_cache_options

PLAIN, CTC = "plain", "ctc"
NAMES = (PLAIN, CTC)


class Engines:
    """The two engines of a pair. `both` runs them at the same time; `one` runs one while the other is stopped.

    Methods raise ValueError with vLLM's error and the path of its log.
    """

    def __init__(self, logs: Path) -> None:
        """logs: folder for vLLM's logs, created if it is not there."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = {name: logs / f"{name}.log" for name in NAMES}
        self._processes: dict[str, MethodProcess] = {}

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._processes.values():
            process.close()

    def start(self, target: str, options: Mapping[str, dict[str, Any]]) -> None:
        """Start both at the same time. options: arguments of `vllm.LLM`, by engine."""
        for name, environment in zip(NAMES, placements()):
            self._processes[name] = MethodProcess(self._logs[name], environment)
        self.both("start", {name: {"target": target, "options": options[name]} for name in NAMES})

    def both(self, command: str, arguments: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        for name in NAMES:
            self._processes[name].send(command, **arguments[name])
        return {name: self._receive(name) for name in NAMES}

    def one(self, name: str, command: str, **arguments: Any) -> Any:
        self._processes[name].send(command, **arguments)
        return self._receive(name)

    def _receive(self, name: str) -> Any:
        try:
            return self._processes[name].receive()
        except MethodFailed as error:
            title = "plain vLLM" if name == PLAIN else "vLLM with CTC trees"
            raise ValueError(f"{title} failed: {error} Its log is {self._logs[name]}.") from error


def options_of_both(
    pair: Pair, method: dict[str, Any], dtype: torch.dtype, max_model_len: int, **both: Any
) -> dict[str, dict[str, Any]]:
    """Options for `Engines.start`, with one request in flight.

    method: keys of `speculative_config` beside method and model. both: further arguments of `vllm.LLM` for both.
    """
    name = str(dtype).removeprefix("torch.")
    common = {**kv_cache_options(str(pair.target), 1, max_model_len, name), "dtype": name, **both}
    ours = {"method": "ctc", "model": str(pair.drafter), **method}
    return {PLAIN: common, CTC: {**common, "speculative_config": ours, "per_request_spec_decode_metrics": "summary"}}


def placements() -> tuple[dict[str, str], dict[str, str]]:
    """Environment variables of the two engines, which put them on different cores of a machine with two.

    There vLLM would bind the threads of both to the same core. Empty with more cores, on a GPU, or if the user has set
    the variable.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) != 2 or "VLLM_CPU_OMP_THREADS_BIND" in os.environ or torch.cuda.is_available():
        return {}, {}
    first, second = ({"VLLM_CPU_OMP_THREADS_BIND": str(core)} for core in cores)
    return first, second
