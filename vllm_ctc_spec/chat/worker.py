"""The engine's process: holds a `vllm.LLM` and answers the terminal's process over a pipe.

    python -m vllm_ctc_spec.chat.worker CONNECTION

CONNECTION is a file descriptor. A process of its own, because vLLM logs to its standard output, and because Ctrl-C in a
terminal is sent to every process of the group, upon which vLLM's processes end.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from vllm_ctc_spec.chat.protocol import (
    Chunk,
    Ended,
    Failed,
    Question,
    Sampling,
    ShowTree,
    Start,
    Started,
    StopAnswer,
    VerifiedTree,
)

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

EXTENSION = "vllm_ctc_spec.chat.recorder.ChatWorkerExtension"
REQUEST_ID = "answer"


def main() -> None:
    connection: Connection = Connection(int(sys.argv[1]))
    # The pipe is closed when the terminal's process ends, whatever the reason.
    with suppress(EOFError, ConnectionError):
        try:
            _serve(connection)
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(Failed(f"{type(error).__name__}: {error}"))


def _serve(connection: Connection) -> None:
    start: Start = connection.recv()
    from vllm import LLM

    from vllm_ctc_spec.vllm_keys import check_engine_keys

    check_engine_keys("--engine", start.options)
    llm = LLM(start.target, worker_extension_cls=EXTENSION, **start.options)
    try:
        llm.collective_rpc("chat_record_trees")
        config = llm.llm_engine.model_config
        connection.send(Started(str(config.dtype).removeprefix("torch."), config.max_model_len))
        while True:
            match connection.recv():
                case Question(prompt, sampling):
                    _answer(llm, connection, prompt, _sampling_params(sampling))
                case ShowTree():
                    fields, *_ = llm.collective_rpc("chat_last_tree")
                    connection.send(None if fields is None else VerifiedTree(**fields))
                case StopAnswer():
                    # The answer ended before the request to stop it arrived.
                    pass
    finally:
        llm.llm_engine.engine_core.shutdown(timeout=0)


def _answer(llm: LLM, connection: Connection, prompt: list[int], params: SamplingParams) -> None:
    engine = llm.llm_engine
    started = time.perf_counter()
    engine.add_request(REQUEST_ID, {"prompt_token_ids": prompt}, params)
    reason = None
    while reason is None:
        for output in engine.step():
            [answer] = output.outputs
            if answer.token_ids:
                connection.send(Chunk(answer.text, len(answer.token_ids)))
            reason = answer.finish_reason
        if reason is None and connection.poll():
            assert isinstance(connection.recv(), StopAnswer)
            engine.abort_request([REQUEST_ID])
            reason = "abort"
    connection.send(Ended(reason, time.perf_counter() - started))


def _sampling_params(sampling: Sampling) -> SamplingParams:
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.vllm_api import one_output_per_step

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        output_kind=one_output_per_step(),
    )


if __name__ == "__main__":
    main()
