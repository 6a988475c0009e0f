"""The process of one method: it has a `vllm.LLM` and answers the benchmark over a pipe.

    python -m vllm_ctc_spec.bench.worker CONNECTION LIFELINE

Both are file descriptors. The benchmark holds the other end of the lifeline open until it ends.
Methods have separate processes because vLLM has one metrics registry per process, because memory is measured per
process, and because a crash then ends one method only.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vllm_ctc_spec.bench.equality import gap_between
from vllm_ctc_spec.bench.records import Answer, Ask, Branching, Drafts, EngineFacts, Gap, Pass, Request, Workload

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams

EXTENSION = "vllm_ctc_spec.bench.worker_extension.BenchWorkerExtension"
NUM_LOGPROBS = 20
"""vLLM's default limit."""


class Engine:
    """The commands. Each public method is called by its name, with keyword arguments."""

    llm: LLM

    def start(self, target: str, options: dict[str, Any], mends_sampling: bool = True) -> EngineFacts:
        """Start vLLM. mends_sampling: whether to correct vLLM's CPU sampling of drafted rows, see `cpu_sampling`."""
        from vllm import LLM

        self.llm = LLM(target, worker_extension_cls=EXTENSION, disable_log_stats=False, **options)
        if mends_sampling:
            self.llm.collective_rpc("bench_mend_sampling")
        config = self.llm.llm_engine.model_config
        dtype = str(config.dtype).removeprefix("torch.")
        return EngineFacts(dtype, config.max_model_len, bool(config.enforce_eager), self._method())

    def _method(self) -> str | None:
        from vllm_ctc_spec.engine.plugin import is_ctc

        config = self.llm.llm_engine.vllm_config.speculative_config
        # vLLM's own name for our method is that of any custom class.
        return None if config is None else "ctc" if is_ctc(config) else str(config.method)

    def run(self, workload: Workload) -> Pass:
        """Run all prompts with `batch_size` requests in flight.

        The loop is that of `LLM.generate`, which would add all requests at once. Here one engine serves every batch
        size.
        """
        from vllm_ctc_spec.engine.lifetime import wake

        wake(self.llm)
        engine = self.llm.llm_engine
        waiting = deque(_Running(index, params) for index, params in enumerate(_sampling_params(workload)))
        running: dict[str, _Running] = {}
        done: list[_Running] = []
        started = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < workload.batch_size:
                request = waiting.popleft()
                running[str(request.index)] = request
                request.started = time.perf_counter()
                prompt: Any = {"prompt_token_ids": list(workload.prompts[request.index])}
                engine.add_request(str(request.index), prompt, request.params)
            for output in engine.step():
                if running[output.request_id].take(output):
                    done.append(running.pop(output.request_id))
        seconds = time.perf_counter() - started
        return Pass(seconds, tuple(request.record() for request in sorted(done, key=lambda each: each.index)))

    def gaps(self, branchings: Sequence[Branching]) -> list[Gap | None]:
        """The gap of each branching; None if one of its tokens is not among the NUM_LOGPROBS most likely."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, logprobs=NUM_LOGPROBS, detokenize=False)
        prompts: Any = [{"prompt_token_ids": list(each.prompt)} for each in branchings]
        with self._logprobs_mode("raw_logits"):
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            gap_between(logits, each.plain_token, each.other_token)
            for each, output in zip(branchings, outputs)
            for logits in scores(output.outputs[0])
        ]

    def answer(self, asks: Sequence[Ask], are_alone: bool, logits_mode: str | None) -> list[Answer] | str:
        """The answers, or vLLM's message if it refuses the parameters.

        are_alone: one request at a time. logits_mode: the `logprobs_mode` of vLLM that returns the wanted logits; None:
        answers have no logits.
        """
        from vllm import SamplingParams

        from vllm_ctc_spec.engine.lifetime import wake
        from vllm_ctc_spec.engine.vllm_api import refusals

        wake(self.llm)
        logits = {"logprobs": NUM_LOGPROBS} if logits_mode else {}
        params = [SamplingParams(**{**ask.params, **logits}) for ask in asks]
        prompts: Any = [{"prompt_token_ids": list(ask.prompt)} for ask in asks]
        size = 1 if are_alone else len(asks)
        outputs: list[RequestOutput] = []
        try:
            with self._logprobs_mode(logits_mode) if logits_mode else nullcontext():
                for start in range(0, len(asks), size):
                    batch = slice(start, start + size)
                    outputs += self.llm.generate(prompts[batch], params[batch], use_tqdm=False)
        except refusals() as error:
            return str(error)
        return [_answer(output.outputs[0], has_logits=logits_mode is not None) for output in outputs]

    def acceptance_length(self) -> float | None:
        """Acceptance length since the engine started; None if nothing was drafted."""
        from vllm_ctc_spec.engine.metrics import read_tree_metrics

        metrics = read_tree_metrics(self.llm)
        return None if metrics is None else metrics.acceptance_length

    @contextmanager
    def _logprobs_mode(self, mode: str) -> Iterator[None]:
        self.llm.collective_rpc("bench_set_logprobs_mode", args=(mode,))
        try:
            yield
        finally:
            self.llm.collective_rpc("bench_set_logprobs_mode", args=(None,))

    def start_clock(self) -> None:
        self.llm.collective_rpc("bench_start_clock")

    def stop_clock(self) -> dict[str, float]:
        [times] = self.llm.collective_rpc("bench_stop_clock")
        return dict(times)

    def reset_memory(self) -> None:
        self.llm.collective_rpc("bench_reset_memory")
        for process in _own_processes():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        """Bytes since `reset_memory`: torch's peak on a GPU, else the peak resident size of the method's processes."""
        on_gpu = sum(self.llm.collective_rpc("bench_peak_memory"))
        return on_gpu or sum(_peak_resident(process) for process in _own_processes())

    def stop(self) -> None:
        # Without a timeout of 0 vLLM waits five seconds, in which its processes do not end by themselves.
        self.llm.llm_engine.engine_core.shutdown(timeout=0)


def scores(answer: CompletionOutput) -> tuple[dict[int, float], ...]:
    """For each token of an answer, log probabilities (or logits, by `logprobs_mode`) of the most likely tokens."""
    return tuple({token: entry.logprob for token, entry in entries.items()} for entries in answer.logprobs or [])


def _answer(answer: CompletionOutput, has_logits: bool) -> Answer:
    kind = "logits" if has_logits else "logprobs"
    return Answer(
        tuple(answer.token_ids), answer.text, answer.finish_reason, answer.stop_reason, **{kind: scores(answer)}
    )


class _Running:
    def __init__(self, index: int, params: SamplingParams) -> None:
        self.index, self.params = index, params
        self.started = 0.0
        self.num_steps = 0
        self.token_ids: list[int] = []

    def take(self, output: RequestOutput) -> bool:
        """Whether the request is done."""
        [answer] = output.outputs
        if answer.token_ids:
            self.num_steps += 1
            self.token_ids += answer.token_ids
        if output.finished:
            self.total_time = time.perf_counter() - self.started
            self.last = output
        return output.finished

    def record(self) -> Request:
        times: Any = self.last.metrics
        counts = self.last.outputs[0].spec_decode_metrics
        return Request(
            token_ids=tuple(self.token_ids),
            num_steps=self.num_steps,
            total_time=self.total_time,
            first_token_time=times.first_token_latency,
            decode_time=times.last_token_ts - times.first_token_ts,
            drafts=None if counts is None else Drafts(tuple(counts.histogram), counts.num_draft_tokens),
        )


def _sampling_params(workload: Workload) -> list[SamplingParams]:
    from vllm import SamplingParams

    from vllm_ctc_spec.engine.vllm_api import one_output_per_step

    return [
        SamplingParams(
            temperature=workload.temperature,
            top_p=workload.top_p,
            seed=workload.seed + index,
            max_tokens=max_tokens,
            ignore_eos=workload.ignore_eos,
            # One output per step, so that steps are counted in the same way for every method.
            output_kind=one_output_per_step(),
        )
        for index, max_tokens in enumerate(workload.max_tokens)
    ]


def _own_processes() -> list[psutil.Process]:
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def _peak_resident(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    [kibibytes] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")] or ["0"]
    return 1024 * int(kibibytes)


def _guard(lifeline: int, connection: int) -> None:
    """Fork a process that kills this one's group if the benchmark dies, because stopped engines do not notice."""
    group = os.getpgrp()
    if child := os.fork():
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    # The connection must close when the method's process dies: that is how the benchmark notices it.
    os.close(connection)
    hang_up = select.poll()
    hang_up.register(lifeline, 0)
    hang_up.poll()
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    descriptor, lifeline = map(int, sys.argv[1:])
    _guard(lifeline, descriptor)
    os.close(lifeline)
    connection: Connection = Connection(descriptor)
    engine = Engine()
    while True:
        try:
            command, arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        try:
            answer: tuple[str, Any] = ("done", getattr(engine, command)(**arguments))
        except Exception as error:
            answer = ("failed", f"{type(error).__name__}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    main()
