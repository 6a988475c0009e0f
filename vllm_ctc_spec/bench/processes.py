"""The methods' processes, each with an engine: one runs at a time, the others are stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import psutil

from vllm_ctc_spec.bench.config import PLAIN, BenchConfig, Method
from vllm_ctc_spec.bench.records import EngineFacts

STOP_SECONDS = 30
"""An engine that takes longer to end is killed."""

TERMINATION_SECONDS = 10
"""What processes that are ended in their work get to give back shared memory."""

_RAISED = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")
_TELLS_NOTHING = ("Engine core initialization failed", "EngineDeadError", "cancelled")


class MethodFailed(Exception):
    """What vLLM said, for the report."""


class MethodProcess:
    """A process group that holds one engine. It is stopped between calls: an idle engine polls for work."""

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        """environment: variables that this process has beside ours, or instead."""
        self._log = log
        self._command: str | None = None
        """What the process is doing."""
        self._connection, theirs = Pipe()
        lifeline, self._lifeline = os.pipe()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_ctc_spec.bench.worker", str(theirs.fileno()), str(lifeline)],
                pass_fds=[theirs.fileno(), lifeline],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # A group of its own to be stopped, and Ctrl-C is for the benchmark, which ends its engines in order.
                start_new_session=True,
                env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | (environment or {}),
            )
        # Only the child may hold the other end, or its death would go unnoticed.
        theirs.close()
        os.close(lifeline)

    def call(self, command: str, **arguments: Any) -> Any:
        """Raises MethodFailed with the cause, also when the process dies meanwhile."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: Any) -> None:
        """The first half of `call`, so that several processes can work at once."""
        self._signal(signal.SIGCONT)
        self._command = command
        # A process that is gone is noticed in `receive`.
        with suppress(OSError):
            self._connection.send((command, arguments))

    def receive(self) -> Any:
        """The second half of `call`."""
        try:
            verdict, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            cause = self._root_cause() or "it left no message"
            raise MethodFailed(f"the process died during {self._command!r}: {cause}") from error
        finally:
            self._signal(signal.SIGSTOP)
        self._command = None
        if verdict == "failed":
            raise MethodFailed(self._root_cause() if _is_empty(answer) else answer)
        return answer

    def close(self) -> None:
        """End the engine, or kill what does not end."""
        self._signal(signal.SIGCONT)
        if self._command is None:
            self.send("stop")
            self._connection.poll(STOP_SECONDS)
        else:
            # It would read "stop" only when it has done what it does, such as compiling a target.
            terminate_group(self._process)
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._lifeline)

    def _root_cause(self) -> str:
        return root_cause(self._log.read_text(errors="replace"))

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def terminate_group(leader: subprocess.Popen[bytes]) -> None:
    """Ask the process group of `leader` to end, and wait until it has, for TERMINATION_SECONDS at most.

    Its last process is Python's resource tracker, which frees the shared memory of the others.
    """
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        group = [psutil.Process(leader.pid), *psutil.Process(leader.pid).children(recursive=True)]
        os.killpg(leader.pid, signal.SIGTERM)
        deadline = time.monotonic() + TERMINATION_SECONDS
        while time.monotonic() < deadline and any(map(_is_alive, group)):
            time.sleep(0.1)


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs; a container may have no process that waits for orphans, so that they stay as zombies."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_empty(message: str) -> bool:
    return any(phrase in message for phrase in _TELLS_NOTHING)


def root_cause(log: str) -> str:
    """The last error in vLLM's log that says what is wrong; its own last line often only points at the log."""
    raised = [match[1] for match in _RAISED.finditer(log) if not _is_empty(match[1])]
    return raised[-1] if raised else ""


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
