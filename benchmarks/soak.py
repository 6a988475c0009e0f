"""A soak: many requests of all kinds, a fifth of them aborted; their answers, what they leave behind, and memory.

    .venv/bin/python -m benchmarks.soak TARGET DRAFTER [--requests 3000] [--prompts FILE]

The first half of the requests goes to `vllm.LLM` with a fixed node budget, the second to `vllm serve` with an adaptive
one, in float32. Every 50th answer is compared with plain vLLM's, which answers these requests alone. Exit status 1 if
an answer differs, a request is left, or the engine's memory grows by more than 5 % after the first sixth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from benchmarks.server import NAME, server

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

IN_FLIGHT = 12
CONTEXT = 1024
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": CONTEXT,
    "max_num_seqs": IN_FLIGHT,
    "kv_cache_memory_bytes": 1 << 28,
}
"""As `vllm.LLM` and, with dashes, `vllm serve` name them."""

OFFLINE = {**ENGINE, "disable_log_stats": False}
ALLOWED_GROWTH = 0.05

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.0, "logprobs": 2, "min_tokens": 5},
    {"temperature": 0.9, "min_p": 0.05, "stop": ["\n\n"]},
    {"temperature": 0.0, "structured_outputs": {"regex": "(ab|cd)[0-9]{1,9}"}},
)
"""Named alike by `SamplingParams` and by the API."""


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    sampling: dict[str, Any]
    abort_after: int | None
    """Outputs after which the request is aborted; None: it is answered."""

    def params(self) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        fields = dict(self.sampling)
        if "structured_outputs" in fields:
            fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
        return SamplingParams(**fields)


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str | None


Done = Callable[[int, Answer | None], None]
"""Called with each request's number and its answer, None of one that was aborted."""


def make_asks(prompts: Sequence[Sequence[int]], count: int, most_tokens: int, compare_every: int) -> dict[int, Ask]:
    """By number. One in five is aborted, but none whose number is divisible by `compare_every`."""
    draw = random.Random(count)
    asks = {}
    for number in range(count):
        prompt = list(draw.choice(prompts))
        length = draw.randint(1, most_tokens)
        sampling = {**draw.choice(KINDS), "seed": number, "max_tokens": length}
        sampling["min_tokens"] = min(sampling.get("min_tokens", 0), length)
        aborted = draw.random() < 0.2 * compare_every / (compare_every - 1) and number % compare_every
        # A step emits at most nine tokens, so that few of these end before.
        after = draw.randint(0, min(4, length // 10)) if aborted else None
        asks[number] = Ask(prompt[: draw.randint(1, len(prompt))], sampling, after)
    return asks


def ask_offline(llm: LLM, asks: Mapping[int, Ask], in_flight: int, done: Done) -> None:
    engine = llm.llm_engine
    waiting = deque(asks)
    outputs: dict[str, int] = {}
    """Of each request in flight, by the engine's name for it."""
    while waiting or outputs:
        while waiting and len(outputs) < in_flight:
            number = waiting.popleft()
            prompt: Any = {"prompt_token_ids": asks[number].prompt}
            engine.add_request(str(number), prompt, asks[number].params())
            outputs[str(number)] = 0
        for name, count in list(outputs.items()):
            if asks[int(name)].abort_after == count:
                engine.abort_request([name])
                del outputs[name]
                done(int(name), None)
        for output in engine.step():
            if output.request_id not in outputs:
                continue
            outputs[output.request_id] += 1
            if output.finished:
                del outputs[output.request_id]
                answer = output.outputs[0]
                done(int(output.request_id), Answer(answer.text, answer.finish_reason))


async def ask_server(url: str, asks: Mapping[int, Ask], in_flight: int, done: Done) -> None:
    places = asyncio.Semaphore(in_flight)
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:

        async def ask(number: int) -> None:
            async with places:
                done(number, await _streamed(client, asks[number]))

        await asyncio.gather(*map(ask, asks))


async def _streamed(client: httpx.AsyncClient, ask: Ask) -> Answer | None:
    body = {"model": NAME, "prompt": ask.prompt, "stream": True, **ask.sampling}
    count, text = 0, ""
    # To leave the stream closes the connection, which aborts the request.
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        if stream.status_code != 200:
            raise RuntimeError((await stream.aread()).decode())
        if ask.abort_after == 0:
            return None
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            text += choice["text"]
            if choice["finish_reason"] is not None:
                return Answer(text, choice["finish_reason"])
            count += 1
            if ask.abort_after == count:
                return None
    raise RuntimeError("the server ended a stream without a finish reason")


@dataclass
class Tally:
    """Counts what is done, compares answers, prints a line every `every` requests."""

    expected: Mapping[int, Answer]
    pid: int
    """Of the process below which the engine's are."""
    warm_up: int
    every: int = 250
    num_done: int = 0
    num_aborted: int = 0
    num_compared: int = 0
    different: list[int] = field(default_factory=list)
    """Numbers of the requests."""
    warm_bytes: int = 0
    """Memory of the engine's processes after `warm_up` requests."""

    def __call__(self, number: int, answer: Answer | None) -> None:
        self.num_done += 1
        self.num_aborted += answer is None
        if number in self.expected:
            self.num_compared += 1
            if answer != self.expected[number]:
                self.different.append(number)
        if self.num_done == self.warm_up:
            self.warm_bytes = engine_bytes(self.pid)
        if self.num_done % self.every == 0:
            print(self, flush=True)

    def __str__(self) -> str:
        return (
            f"{self.num_done} requests, {self.num_aborted} of them aborted; {self.num_compared} answers compared, "
            f"{len(self.different)} differ; engine {engine_bytes(self.pid) / 1e6:.0f} MB, front end "
            f"{psutil.Process(self.pid).memory_info().rss / 1e6:.0f} MB"
        )

    def growth(self) -> int:
        """Bytes by which the engine's memory has grown since the warm-up. It must still run."""
        return engine_bytes(self.pid) - self.warm_bytes


def engine_bytes(pid: int) -> int:
    """Resident memory of the processes that one has started."""
    return sum(each.memory_info().rss for each in psutil.Process(pid).children(recursive=True))


def remembered(worker: Any) -> dict[str, int]:
    """Of how many requests a worker of ours still keeps something."""
    runner = worker.model_runner
    return {"requests": len(runner.requests), "trees": len(runner.trees)}


def left_over(values: Mapping[str, float]) -> dict[str, float]:
    """The gauges of vLLM that are not 0. values: by name."""
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return {name: values[name] for name in gauges if values[name]}


def metrics_of(llm: LLM) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def gauges_at(url: str) -> dict[str, float]:
    """Summed over engines."""
    values: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("vllm:"):
            name, value = line.partition("{")[0], float(line.rpartition(" ")[2])
            values[name] = values.get(name, 0.0) + value
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--max-tokens", type=int, default=200, help="most tokens of an answer (default %(default)s)")
    parser.add_argument("--prompts", type=Path, help="JSON lines, as for `vllm-ctc-spec verify` (default: its own)")
    options = parser.parse_args()
    # For `remembered`, which is sent to the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    sys.exit(soak(options))


def soak(options: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from vllm_ctc_spec.engine.lifetime import started
    from vllm_ctc_spec.verify.prompts import read_verify_prompts

    prompts = read_verify_prompts(options.prompts, 1000, AutoTokenizer.from_pretrained(options.target))
    asks = make_asks(prompts, options.requests, options.max_tokens, compare_every=50)
    expected: dict[int, Answer | None] = {}
    compared = {number: ask for number, ask in asks.items() if number % 50 == 0}
    with started(options.target, **OFFLINE) as plain:
        ask_offline(plain, compared, 1, expected.__setitem__)
    half = len(asks) // 2
    ours = {"method": "ctc", "model": options.drafter}
    problems = []
    with started(options.target, **OFFLINE, speculative_config={**ours, "adaptive_budget": False}) as llm:
        tally = Tally(_answered(expected), os.getpid(), options.requests // 6)
        ask_offline(llm, {number: asks[number] for number in range(half)}, IN_FLIGHT, tally)
        ask_offline(llm, {0: asks[0]}, 1, tally)
        problems += _problems("LLM", tally, left_over(metrics_of(llm)))
        problems += [f"LLM: {state}" for state in llm.collective_rpc(remembered) if max(state.values()) > 1]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with server(options.target, log, *flags, "-sc", json.dumps(ours)) as running:
            tally = Tally(_answered(expected), running.pid, options.requests // 6)
            rest = {number: asks[number] for number in range(half, len(asks))}
            asyncio.run(ask_server(running.url, rest, IN_FLIGHT, tally))
            asyncio.run(ask_server(running.url, {0: asks[0]}, 1, tally))
            problems += _problems("server", tally, left_over(gauges_at(running.url)))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _answered(answers: Mapping[int, Answer | None]) -> dict[int, Answer]:
    return {number: answer for number, answer in answers.items() if answer is not None}


def _problems(where: str, tally: Tally, left: Mapping[str, float]) -> list[str]:
    growth = tally.growth() / tally.warm_bytes
    print(f"{where}: {tally}; memory grew by {growth:.1%} after the first {tally.warm_up}", flush=True)
    found = [f"{where}: answer {number} differs from plain vLLM's" for number in tally.different]
    found += [f"{where}: {name} is {value} at the end" for name, value in left.items()]
    if growth > ALLOWED_GROWTH:
        found.append(f"{where}: memory grew by {growth:.1%}, more than {ALLOWED_GROWTH:.0%}")
    return found


if __name__ == "__main__":
    main()
