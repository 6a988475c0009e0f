"""The methods' processes, each with an engine. One runs at a time, the others are stopped."""

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
"""An idle engine that takes longer to end is killed."""

TERMINATION_SECONDS = 10
"""A busy engine that takes longer to end is killed. Until then its processes free their shared memory."""

_RAISED = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")
_UNINFORMATIVE = ("Engine core initialization failed", "EngineDeadError", "cancelled")


class MethodFailed(Exception):
    """The message is vLLM's own error."""


class MethodProcess:
    """A process group with one engine. It is stopped between calls, because an idle engine polls for work."""

    def __init__(self, log: Path, environment: dict[str, str] | None = None) -> None:
        """environment: variables that replace or extend those of this process."""
        self._log = log
        self._command: str | None = None
        """The command that the process executes; None while it is idle."""
        self._connection, theirs = Pipe()
        lifeline, self._lifeline = os.pipe()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_ctc_spec.bench.worker", str(theirs.fileno()), str(lifeline)],
                pass_fds=[theirs.fileno(), lifeline],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # An own group can be stopped as a whole, and does not get Ctrl-C: the benchmark ends its engines.
                start_new_session=True,
                env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | (environment or {}),
            )
        # While this process holds the other end open, the child's death would not close the connection.
        theirs.close()
        os.close(lifeline)

    def call(self, command: str, **arguments: Any) -> Any:
        """Execute a command of `worker.Engine`. Raises MethodFailed if it fails or the process dies."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: Any) -> None:
        """The first half of `call`, for processes that work at the same time."""
        self._signal(signal.SIGCONT)
        self._command = command
        # If the process is gone, `receive` reports it.
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
            raise MethodFailed(self._root_cause() if _is_uninformative(answer) else answer)
        return answer

    def close(self) -> None:
        """End the engine; kill it if it does not end in time."""
        self._signal(signal.SIGCONT)
        if self._command is None:
            self.send("stop")
            self._connection.poll(STOP_SECONDS)
        else:
            # It would read "stop" only after its command, and compiling a target may take minutes.
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
    """Ask the process group of `leader` to end, and wait for it, for TERMINATION_SECONDS at most.

    The last process to end is Python's resource tracker, which frees the shared memory of the others.
    """
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        group = [psutil.Process(leader.pid), *psutil.Process(leader.pid).children(recursive=True)]
        os.killpg(leader.pid, signal.SIGTERM)
        deadline = time.monotonic() + TERMINATION_SECONDS
        while time.monotonic() < deadline and any(map(_is_alive, group)):
            time.sleep(0.1)


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs. Zombies do not: in a container without a process that waits for orphans they stay for ever."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_uninformative(message: str) -> bool:
    return any(phrase in message for phrase in _UNINFORMATIVE)


def root_cause(log: str) -> str:
    """The last error in vLLM's log that names a cause, or "". The log's last line is often only "see above"."""
    raised = [match[1] for match in _RAISED.finditer(log) if not _is_uninformative(match[1])]
    return raised[-1] if raised else ""


class Fleet:
    """The engines of all methods, of which one runs at a time.

    All are in memory at the same time, so free memory is checked before each start.
    """

    def __init__(self, config: BenchConfig, logs: Path) -> None:
        self._config, self._logs = config, logs
        self._processes: dict[str, MethodProcess] = {}
        self.facts: dict[str, EngineFacts] = {}
        self.errors: dict[str, str] = {}
        """By method, the reason why it is not measured."""

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._processes.values():
            process.close()

    def start(self, report: Callable[[Method], None]) -> None:
        """Start all methods, with a call of `report` before each. Raises ValueError if plain vLLM does not start."""
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
        """The method's answer; None if it failed, after which it is no longer alive. Raises ValueError if plain vLLM
        failed."""
        try:
            return self._processes[name].call(command, **arguments)
        except MethodFailed as error:
            self._fail(name, str(error))
            return None

    def stage_times(self, name: str, work: dict[str, Any]) -> dict[str, float] | None:
        """Milliseconds per stage in one more pass; None if they cannot be timed. The method stays alive."""
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
