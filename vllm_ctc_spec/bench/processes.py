"""The benchmark's side of the methods' processes: one runs, the others stand still."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

STOP_SECONDS = 30
"""An engine that takes longer to end is killed."""

_RAISED = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception|Interrupt): .+)")
_TELLS_NOTHING = ("Engine core initialization failed", "EngineDeadError", "cancelled")


class MethodFailed(Exception):
    """What vLLM said, for the report."""


class MethodProcess:
    """A process group that holds one engine. It is stopped between calls: an idle engine polls for work."""

    def __init__(self, log: Path) -> None:
        self._log = log
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
                env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
            )
        # Only the child may hold the other end, or its death would go unnoticed.
        theirs.close()
        os.close(lifeline)

    def call(self, command: str, **arguments: Any) -> Any:
        """Raises MethodFailed with the cause, also when the process dies meanwhile."""
        self._signal(signal.SIGCONT)
        try:
            return _ask(self._connection, self._log, command, arguments)
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the engine, or kill what does not end."""
        self._signal(signal.SIGCONT)
        with suppress(MethodFailed):
            _ask(self._connection, self._log, "stop", {})
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._lifeline)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _ask(connection: Connection, log: Path, command: str, arguments: dict[str, Any]) -> Any:
    try:
        connection.send((command, arguments))
        verdict, answer = connection.recv()
    except (EOFError, OSError) as error:
        cause = root_cause(log.read_text(errors="replace")) or "it left no message"
        raise MethodFailed(f"the process died during {command!r}: {cause}") from error
    if verdict == "failed":
        raise MethodFailed(root_cause(log.read_text(errors="replace")) if _is_empty(answer) else answer)
    return answer


def _is_empty(message: str) -> bool:
    return any(phrase in message for phrase in _TELLS_NOTHING)


def root_cause(log: str) -> str:
    """The last error in vLLM's log that says what is wrong; its own last line often only points at the log."""
    raised = [match[1] for match in _RAISED.finditer(log) if not _is_empty(match[1])]
    return raised[-1] if raised else ""
