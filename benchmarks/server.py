"""`vllm serve` as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

BINARIES = Path(sys.executable).parent
NAME = "served"
"""Of the model, in requests."""

START_SECONDS = 900
STOP_SECONDS = 30


@dataclass(frozen=True)
class Server:
    url: str
    pid: int


@contextmanager
def server(target: str | os.PathLike[str], log: Path, *arguments: str) -> Iterator[Server]:
    """A server that answers, with the given options; its output goes to `log`. Raises RuntimeError with the log's end
    if it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(BINARIES / "vllm"), "serve", str(target), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", NAME, *arguments]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(process, url, log)
            yield Server(url, process.pid)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
