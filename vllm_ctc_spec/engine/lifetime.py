"""Engines that end when their block ends, and that take turns on one machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread
from typing import Any, TypeVar

import psutil
from vllm import LLM
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

Result = TypeVar("Result")


@contextmanager
def started(model: str, **options: Any) -> Iterator[LLM]:
    """`vllm.LLM(model, **options)`. Dropping the object alone leaves its processes to the garbage collector."""
    llm = LLM(model, **options)
    client = llm.llm_engine.engine_core
    if isinstance(client, SyncMPClient):
        Thread(target=_report_death, args=(client.output_queue_thread, client.outputs_queue), daemon=True).start()
    try:
        yield llm
    finally:
        client.shutdown()
        del llm, client
        gc.collect()


def _report_death(receiver: Thread, outputs: Any) -> None:
    """Have a call that waits for `outputs` raise when the engine's process is killed, as it does in `AsyncMPClient`.

    `SyncMPClient` ends the thread that receives the outputs, and would wait forever.
    """
    receiver.join()
    outputs.put(EngineDeadError())


def wake(llm: LLM) -> None:
    """To be called before the work of an engine that has stood still is timed: its worker may have missed the notice of
    a message meanwhile, and would find it up to five seconds later (SHM_READER_RECHECK_INTERVAL_MS of
    vllm/distributed/device_communicators/shm_broadcast.py).
    """
    llm.collective_rpc("check_health")


class TakingTurns:
    """Several engines of which one runs at a time.

    An idle engine polls for work and would take processor time from the one that is measured, and more from one
    that makes more steps; so all but that one are stopped meanwhile.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._processes: list[set[psutil.Process]] = []
        self._engines: list[LLM] = []

    def __enter__(self) -> TakingTurns:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def start(self, model: str, **options: Any) -> LLM:
        before = _children()
        self._engines.append(self._stack.enter_context(started(model, **options)))
        self._processes.append(_children() - before)
        return self._engines[-1]

    def turn(self, llm: LLM, work: Callable[[LLM], Result]) -> Result:
        """`work(llm)` while the other engines stand still."""
        waiting = [
            process
            for engine, processes in zip(self._engines, self._processes)
            if engine is not llm
            for process in processes
            if process.is_running()
        ]
        try:
            for process in waiting:
                process.suspend()
            wake(llm)
            return work(llm)
        finally:
            for process in waiting:
                process.resume()


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))
