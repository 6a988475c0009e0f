"""The methods' processes, without engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from vllm_ctc_spec.bench.processes import TERMINATION_SECONDS, MethodFailed, MethodProcess, root_cause, terminate_group


@pytest.fixture
def process(tmp_path: Path) -> Iterator[MethodProcess]:
    process = MethodProcess(tmp_path / "method.log")
    yield process
    process.close()


def test_a_command_that_fails_leaves_the_process_alive(process: MethodProcess):
    for _ in range(2):
        with pytest.raises(MethodFailed, match=r"AttributeError: .*'llm'"):
            process.call("start_clock")


def test_it_stands_still_between_calls(process: MethodProcess):
    with pytest.raises(MethodFailed):
        process.call("start_clock")
    deadline = time.monotonic() + 20
    while (status := psutil.Process(process._process.pid).status()) != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, status
        time.sleep(0.01)


def test_a_process_that_dies_is_told_by_its_log(process: MethodProcess):
    process._log.write_text("ValueError: no such head\n")
    os.killpg(process._process.pid, signal.SIGKILL)
    with pytest.raises(MethodFailed, match="died during 'run': ValueError: no such head"):
        process.call("run", workload=None)


def test_a_process_that_is_ended_in_its_work_frees_its_shared_memory(tmp_path: Path):
    code = (
        "from multiprocessing.shared_memory import SharedMemory\n"
        "memory = SharedMemory(create=True, size=64)\n"
        "print(memory.name, flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    memory = Path("/dev/shm") / leader.stdout.readline().decode().strip()
    assert memory.exists()
    started = time.monotonic()
    terminate_group(leader)
    assert time.monotonic() - started < TERMINATION_SECONDS
    assert not memory.exists()
    assert leader.wait() == -signal.SIGTERM
    leader.stdout.close()


def test_stopped_processes_do_not_outlive_a_killed_benchmark(tmp_path: Path):
    code = (
        "import os, pathlib, sys\n"
        "from vllm_ctc_spec.bench.processes import MethodFailed, MethodProcess\n"
        "process = MethodProcess(pathlib.Path(sys.argv[1]))\n"
        "try: process.call('start_clock')\n"
        "except MethodFailed: pass\n"
        "print(process._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(killed.stdout)).wait(timeout=20)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", ""),
        ("INFO all is well", ""),
        (
            "(EngineCore pid=7) ERROR 11-21 ValueError: head size 48 is not supported\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: head size 48 is not supported",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory", "torch.OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_the_root_cause_is_found_above_the_line_that_points_at_it(log: str, cause: str):
    assert root_cause(log) == cause
