"""The methods of a run, each in its process; those that fail leave, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vllm_ctc_spec.bench.config import PLAIN, BenchConfig, Method
from vllm_ctc_spec.bench.processes import MethodFailed, MethodProcess
from vllm_ctc_spec.bench.records import EngineFacts


class Fleet:
    """Engines of all methods at once, of which one runs; so their memory adds up, and is checked before each start."""

    def __init__(self, config: BenchConfig, logs: Path) -> None:
        self._config, self._logs = config, logs
        self._processes: dict[str, MethodProcess] = {}
        self.facts: dict[str, EngineFacts] = {}
        self.errors: dict[str, str] = {}
        """Method -> why it is not measured."""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._processes.values():
            process.close()

    def start(self, report: Callable[[Method], None]) -> None:
        """Start every method, calling `report` before each. Raises ValueError if plain vLLM does not start."""
        self._logs.mkdir(parents=True, exist_ok=True)
        largest = 0
        for method in self._config.methods:
            report(method)
            if method.missing is not None:
                self.errors[method.name] = f"skipped: it requires the package {method.missing}, which is not installed"
                continue
            free = psutil.virtual_memory().available
            if free < largest:
                self._fail(method.name, f"not started: {free >> 20} MiB of memory are free, another engine took "
                           f"{largest >> 20} MiB. Measure fewer methods at a time with --only.")  # fmt: skip
                continue
            self._processes[method.name] = MethodProcess(self._logs / f"{method.name}.log")
            options = self._config.engine_options(method)
            facts = self.call(method.name, "start", target=self._config.target, options=options)
            if facts is not None:
                self.facts[method.name] = facts
                largest = max(largest, free - psutil.virtual_memory().available)

    @property
    def alive(self) -> list[Method]:
        return [method for method in self._config.methods if method.name in self._processes]

    def call(self, name: str, command: str, **arguments: Any) -> Any:
        """The method's answer, or None if it failed; it is then no longer alive."""
        try:
            return self._processes[name].call(command, **arguments)
        except MethodFailed as error:
            self._fail(name, str(error))
            return None

    def stage_times(self, name: str, work: dict[str, Any]) -> dict[str, float] | None:
        """Milliseconds per stage during one more pass. A clock that does not fit costs these figures only."""
        process = self._processes[name]
        try:
            process.call("start_clock")
            process.call("run", **work)
            return dict(process.call("stop_clock"))
        except MethodFailed:
            return None

    def _fail(self, name: str, error: str) -> None:
        self.errors[name] = error
        if name in self._processes:
            self._processes.pop(name).close()
        if name == PLAIN:
            raise ValueError(f"methods.{PLAIN} failed, and nothing can be compared without it: {error}")
