"""One engine in this process: answers prompts, greedy and seeded, and writes tokens and times. See engine_check.

    python -m benchmarks.gpu.engine_run JOB

JOB is the JSON of a `Job`. A second pass is measured, because the first compiles kernels; engines that run at the same
time measure one after another.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from vllm_ctc_spec.bench.records import Pass, Workload
from vllm_ctc_spec.bench.worker import Engine

SEED = 1000
TEMPERATURES = {"greedy": 0.0, "seeded": 1.0}


@dataclass(frozen=True)
class Job:
    target: str
    spec: dict[str, Any] | None
    """`speculative_config`; None is plain vLLM."""
    options: dict[str, Any]
    """Of the engine."""
    prompts: list[list[int]]
    """Token ids; all in one batch."""
    max_tokens: int
    lock: str
    answers: str
    """File to write."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def main(job: Job) -> None:
    from vllm_ctc_spec.engine.plugin import register

    # vLLM finds the plugin by itself only where the package is installed.
    register()
    engine = Engine()
    engine.start(job.target, {**job.options, "speculative_config": job.spec})
    result: dict[str, Any] = {"facts": facts(engine.llm)}
    for name, temperature in TEMPERATURES.items():
        count = len(job.prompts)
        work = Workload(
            tuple(map(tuple, job.prompts)), (job.max_tokens,) * count, temperature, SEED, count, ignore_eos=True
        )
        first = engine.run(work)
        with FileLock(job.lock):
            second = engine.run(work)
        result[name] = {
            "tokens": tokens(second),
            "repeats": tokens(first) == tokens(second),
            "ms_per_step": ms_per_step(second),
        }
    if job.spec is None:
        result["gaps"] = top_gaps(engine.llm, job)
    else:
        result["acceptance_length"] = engine.acceptance_length()
    Path(job.answers).write_text(json.dumps(result), encoding="utf-8")
    engine.stop()


def tokens(done: Pass) -> list[list[int]]:
    return [list(request.token_ids) for request in done.requests]


def ms_per_step(done: Pass) -> float:
    """Between the steps of a request that emit tokens, its prefill left out; mean."""
    return 1e3 * sum(each.decode_time for each in done.requests) / sum(each.num_steps - 1 for each in done.requests)


def top_gaps(llm: Any, job: Job) -> list[list[float]]:
    """For each greedy token of plain vLLM, by how much its logit is above the next one's."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=job.max_tokens, logprobs=2, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job.prompts], params, use_tqdm=False)
    gaps = []
    for output in outputs:
        steps = ([entry.logprob for entry in entries.values()] for entries in output.outputs[0].logprobs)
        gaps.append([max(step) - min(step) for step in steps])
    return gaps


def facts(llm: Any) -> dict[str, Any]:
    """What vLLM chose."""
    import torch
    import vllm
    from vllm.compilation.counter import compilation_counter

    config = llm.llm_engine.vllm_config
    [runner] = llm.collective_rpc(lambda worker: type(worker.model_runner))
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "runner": f"{runner.__module__}.{runner.__qualname__}",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "graphs_captured": compilation_counter.num_cudagraph_captured,
    }


if __name__ == "__main__":
    main(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
