"""The engine's process, as the terminal's process sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from vllm_ctc_spec.bench.processes import root_cause, terminate_group
from vllm_ctc_spec.chat.protocol import (
    Chunk,
    Ended,
    Failed,
    Question,
    ShowTree,
    Start,
    Started,
    StopAnswer,
    VerifiedTree,
)

STOP_SECONDS = 20
"""An engine that takes longer to end is killed."""


class ChatEngine:
    """Starts the process, which logs to `log`. Methods raise ValueError with vLLM's own reason if it fails."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._is_ready = False
        self._connection, theirs = Pipe()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_ctc_spec.chat.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C stops an answer, not the engine.
                start_new_session=True,
                env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
            )
        # Only the child may hold the other end: `recv` then raises EOFError when the child ends.
        theirs.close()

    def start(self, target: str, options: dict[str, Any]) -> Started:
        """Returns when the engine is ready, which takes seconds to minutes. options: for `vllm.LLM`."""
        started: Started = self._ask(Start(target, options))
        self._is_ready = True
        return started

    def answer(self, question: Question) -> Iterator[Chunk | Ended]:
        """A Chunk after each decoding step, then Ended."""
        message: Chunk | Ended = self._ask(question)
        yield message
        while not isinstance(message, Ended):
            message = self._receive()
            yield message

    def stop_answer(self) -> None:
        """Ask the engine to end the answer; `answer` still yields until Ended."""
        self._send(StopAnswer())

    def last_tree(self) -> VerifiedTree | None:
        tree: VerifiedTree | None = self._ask(ShowTree())
        return tree

    def close(self) -> None:
        """End the engine; after STOP_SECONDS its processes are killed."""
        self._connection.close()
        if not self._is_ready:
            # Before it is ready, it does not read the pipe and would not see that it is closed.
            terminate_group(self._process)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS if self._is_ready else 0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, message: Any) -> Any:
        self._send(message)
        return self._receive()

    def _send(self, message: Any) -> None:
        # If the process is gone, `_receive` reports why, from the log.
        with suppress(ConnectionError):
            self._connection.send(message)

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionError):
            message = Failed("")
        if isinstance(message, Failed):
            raise ValueError(f"{self._reason(message.cause)} (vLLM's log: {self._log})")
        return message

    def _reason(self, raised: str) -> str:
        """One line: the cause from vLLM's log where the exception only refers to it."""
        line = " ".join(raised.split())
        cause = root_cause(line) or root_cause(self._log.read_text(errors="replace"))
        return cause.removeprefix("ValueError: ") or line or "vLLM's process ended without a message."
