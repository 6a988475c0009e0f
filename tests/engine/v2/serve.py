"""Serves groups of requests on Model Runner V2, in Triton's interpreter, and writes the answers.

    TRITON_INTERPRET=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_USE_V2_MODEL_RUNNER=1 python -m tests.engine.v2.serve JOB

It is a process of its own, because Triton must claim to support a CPU before vLLM is imported.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Job:
    target: str
    spec: dict[str, Any] | None
    """`speculative_config`; None is plain vLLM."""
    prompts: list[list[int]]
    """Token ids."""
    groups: dict[str, list[dict[str, Any]]]
    """Sampling parameters of each group, one set per prompt; a group is one batch."""
    answers: str
    """File to write."""
    other_prompts: dict[str, list[list[int]]] = field(default_factory=dict)
    """Prompts of groups that do not have `prompts`."""
    adapters: list[str | None] = field(default_factory=list)
    """Folders of LoRA adapters, for the requests of the group "adapters" in turn."""
    before: dict[str, str] = field(default_factory=dict)
    """Method of the worker that is called before a group."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the engine."""
    aborts: bool = False
    """Whether to add a group "aborts", half of whose first requests are aborted."""
    async_scheduling: bool = False
    worker: str | None = None
    """Replaces our worker for CPU."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def main(job: Job) -> None:
    from vllm import LLM

    if job.async_scheduling:
        _allow_async_scheduling()
    if job.worker is not None:
        from vllm_ctc_spec.engine import plugin

        plugin.V2_WORKERS["cpu"] = job.worker
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 26,
        "disable_log_stats": False,
        "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
        "kernel_config": {"enable_jit_warmup": False},
    }
    llm = LLM(job.target, speculative_config=job.spec, **{**settings, **job.options})
    config = llm.llm_engine.vllm_config
    assert config.use_v2_model_runner and config.scheduler_config.async_scheduling == job.async_scheduling
    answers = {name: _serve(llm, job, name) for name in job.groups}
    if job.aborts:
        answers["aborts"] = _serve_with_aborts(llm, job.prompts)
    seen = {}
    if job.spec is not None:
        [seen, *_] = llm.collective_rpc("what_was_seen")
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    Path(job.answers).write_text(json.dumps({"answers": answers, "seen": seen, "metrics": metrics}), encoding="utf-8")


def _serve(llm: Any, job: Job, name: str) -> list[dict[str, Any]]:
    from vllm.lora.request import LoRARequest

    if name in job.before:
        llm.collective_rpc(job.before[name])
    prompts = job.other_prompts.get(name, job.prompts)
    folders = job.adapters if name == "adapters" else [None]
    adapters = [folder and LoRARequest(folder, index, folder) for index, folder in enumerate(folders)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [_params(params) for params in job.groups[name]],
        lora_request=[adapters[index % len(adapters)] for index in range(len(prompts))],
        use_tqdm=False,
    )
    return [_answer(output.outputs[0]) for output in outputs]


def _serve_with_aborts(llm: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Abort every second request after its first tokens, then add as many requests as at first."""
    engine, params = llm.llm_engine, {"temperature": 0.8, "max_tokens": 12}
    kept = {}
    for index, prompt in enumerate(prompts):
        engine.add_request(f"early-{index}", {"prompt_token_ids": prompt}, _params({**params, "seed": index}))
    for step in range(500):
        if step == 4:
            engine.abort_request([f"early-{index}" for index in range(0, len(prompts), 2)])
        if step == 5:
            for index, prompt in enumerate(prompts):
                engine.add_request(
                    f"late-{index}", {"prompt_token_ids": prompt}, _params({**params, "seed": 50 + index})
                )
        if not engine.has_unfinished_requests():
            break
        kept |= {output.request_id: output for output in engine.step() if output.finished}
    return [_answer(kept[name].outputs[0]) for name in sorted(kept)]


def _params(fields: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structured = fields.get("structured_outputs")
    if structured is not None:
        fields = {**fields, "structured_outputs": StructuredOutputsParams(**structured)}
    if "logit_bias" in fields:
        fields = {**fields, "logit_bias": {int(token): bias for token, bias in fields["logit_bias"].items()}}
    return SamplingParams(**fields)


def _answer(output: Any) -> dict[str, Any]:
    logprobs = None
    if output.logprobs is not None:
        logprobs = [
            {token: [entry.logprob, entry.rank] for token, entry in entries.items()} for entries in output.logprobs
        ]
    return {
        "tokens": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "logprobs": logprobs,
    }


def _interpret() -> None:
    import triton.backends

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp

    # Triton's interpreter fails in this kernel; vLLM also has a plain version.
    topk_topp.HAS_TRITON = False


def _allow_async_scheduling() -> None:
    """Keep vLLM's choice, which its CPU platform turns off."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, config: Any) -> None:
        decided = config.scheduler_config.async_scheduling
        original(cls, config)
        config.scheduler_config.async_scheduling = decided

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


if __name__ in ("__main__", "__mp_main__"):
    # Also in worker processes, which import this module as __mp_main__.
    _interpret()
if __name__ == "__main__":
    main(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
