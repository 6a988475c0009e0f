"""Model Runner V2 in Triton's interpreter gives the answers of plain vLLM on V2 (float32)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engine.adapters import LORA, write_adapter
from tests.engine.conftest import made_once
from tests.engine.v2.serve import Job
from tests.tiny_pair import TinyPair

WATCHED = "tests.engine.v2.workers.WatchedWorkerV2"
TRITON = "tests.engine.v2.workers.TritonWorkerV2"
RULED = "tests.engine.v2.workers.RuledWorkerV2"
NUM_PROMPTS = 4
NUM_NODES = 8


def per_prompt(**params: Any) -> list[dict[str, Any]]:
    return [{"seed": 100 + index, "max_tokens": 10 + 2 * index, **params} for index in range(NUM_PROMPTS)]


def kinds(*params: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"seed": 200 + index, "max_tokens": 14, **params[index % len(params)]} for index in range(NUM_PROMPTS)]


GROUPS: dict[str, list[dict[str, Any]]] = {
    "greedy": per_prompt(temperature=0),
    "seeded": per_prompt(temperature=0.8),
    "top-p and top-k": kinds(
        {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "top_k": 12}, {"temperature": 0.6, "min_p": 0.05}
    ),
    "penalties": kinds(
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "presence_penalty": 0.7},
        {"temperature": 0.8, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
        {"temperature": 0.9},
    ),
    "log probabilities": per_prompt(temperature=0.8, logprobs=3),
    "log probabilities with penalties": per_prompt(temperature=0, logprobs=2, presence_penalty=0.5),
    "limits and biases": kinds(
        {"temperature": 0, "min_tokens": 6, "stop_token_ids": [10, 32, 60]},
        {"temperature": 0, "logit_bias": {"60": 2.0, "70": -100.0}},
        {"temperature": 0.7, "allowed_token_ids": list(range(256))},
        {"temperature": 0, "max_tokens": 3, "ignore_eos": True},
    ),
    "bad words and stop strings": kinds(
        {"temperature": 0, "bad_words": ["self.", "import os"]}, {"temperature": 0, "stop": ["\n", "("]}
    ),
    "structured output": kinds(
        {"temperature": 0.8, "structured_outputs": {"regex": r"(ab|cd)[0-9]{4}x"}},
        {"temperature": 0},
        {"temperature": 0, "structured_outputs": {"choice": ["import os", "import sys"]}},
    ),
}

LONG = [{"temperature": 0.8 * (index % 2), "seed": index, "max_tokens": 40, "ignore_eos": True} for index in range(4)]
SHARED = {"first": LONG, "second": LONG}
"""Two groups of long answers."""


@pytest.fixture(scope="module")
def prompts(pair: TinyPair) -> list[list[int]]:
    """Token ids; one prompt is a single token, one is read in several steps beside the others."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    rows = [json.loads(line)["prompt"] for line in pair.prompts.open(encoding="utf-8")]
    tokens = [token for row in rows for token in tokenizer.encode(row)]
    return [tokens[start : start + length] for start, length in ((0, 20), (40, 1), (60, 45), (120, 9))]


class Served:
    def __init__(self, written: dict[str, Any]) -> None:
        self.answers: dict[str, list[dict[str, Any]]] = written["answers"]
        self.seen: dict[str, Any] = written["seen"]
        self.metrics: dict[str, float] = written["metrics"]


def serve(folder: Path, job: Job) -> Served:
    path = folder / f"{Path(job.answers).stem}.job.json"
    job.write(path)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Inductor would try to compile with the pretended backend.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    command = [sys.executable, "-m", "tests.engine.v2.serve", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return Served(json.loads(Path(job.answers).read_text(encoding="utf-8")))


def serve_once(tmp_path_factory: pytest.TempPathFactory, job: partial[Job]) -> Served:
    folder = tmp_path_factory.mktemp("served")
    return made_once(tmp_path_factory, f"v2-{job.keywords['name']}", lambda: serve(folder, job(folder=folder)))


def job_of(pair: TinyPair, prompts: list[list[int]], folder: Path, name: str, **fields: Any) -> Job:
    options = {"max_model_len": 128, "max_num_seqs": NUM_PROMPTS, "max_num_batched_tokens": 48, "block_size": 32}
    fields = {"groups": GROUPS, "spec": None, **fields}
    fields["options"] = options | fields.get("options", {})
    return Job(target=str(pair.target), prompts=prompts, answers=str(folder / f"{name}.json"), **fields)


def spec_of(pair: TinyPair, **spec: Any) -> dict[str, Any]:
    ours = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": NUM_NODES}
    return {**ours, "adaptive_budget": False, **spec}


@pytest.fixture(scope="module")
def shared(prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """Prompts of two groups; all begin with the same long text."""
    prompts = [prompts[2] + prompts[0] + prompt[:3] for prompt in prompts]
    return {"first": prompts, "second": prompts}


@pytest.fixture(scope="module")
def plain(
    pair: TinyPair,
    prompts: list[list[int]],
    shared: dict[str, list[list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    groups = {"groups": GROUPS | SHARED, "other_prompts": shared}
    job = partial(job_of, pair, prompts, name="plain", aborts=True, **groups)
    return serve_once(tmp_path_factory, job)


@pytest.fixture(scope="module")
def trees(pair: TinyPair, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Served:
    job = partial(job_of, pair, prompts, name="trees", spec=spec_of(pair), worker=WATCHED, aborts=True)
    return serve_once(tmp_path_factory, job)


@pytest.fixture(scope="module")
def adaptive(
    pair: TinyPair,
    prompts: list[list[int]],
    shared: dict[str, list[list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    """Asynchronous scheduling; in the group "misled" the drafter is always wrong."""
    fields = {
        "spec": spec_of(pair, adaptive_budget=True),
        "groups": {**GROUPS, "misled": SHARED["first"]},
        "other_prompts": {"misled": shared["first"]},
        "before": {"misled": "mislead"},
        "aborts": True,
        "async_scheduling": True,
    }
    return serve_once(tmp_path_factory, partial(job_of, pair, prompts, name="adaptive", worker=RULED, **fields))


SHORT: dict[str, Any] = {
    "groups": {
        "short": kinds(
            {"temperature": 0, "max_tokens": 100, "ignore_eos": True},
            {"temperature": 0.8, "max_tokens": 30, "logprobs": 1, "top_k": 20},
            {"temperature": 0.8, "max_tokens": 20, "logprobs": 2, "presence_penalty": 0.4},
        ),
        "at once": kinds({"temperature": 0.8, "max_tokens": 8, "logprobs": 2, "top_k": 20}),
    },
    "options": {"max_model_len": 64, "max_num_batched_tokens": 300, "logprobs_mode": "processed_logprobs"},
}
"""An engine whose context is so short that an answer reaches its end."""


@pytest.fixture(scope="module")
def short_plain(pair: TinyPair, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve_once(tmp_path_factory, partial(job_of, pair, prompts, name="short", **SHORT))


def assert_equal(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert _without_logprobs(ours) == _without_logprobs(theirs)
        assert (ours["logprobs"] is None) == (theirs["logprobs"] is None)
        for mine, reference in zip(ours["logprobs"] or [], theirs["logprobs"] or [], strict=True):
            assert mine.keys() == reference.keys()
            for token, (logprob, rank) in reference.items():
                assert math.isclose(mine[token][0], logprob, abs_tol=1e-4) and mine[token][1] == rank


def _without_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "logprobs"}


@pytest.mark.slow
@pytest.mark.parametrize("group", [*GROUPS, "aborts"])
def test_answers_are_those_of_plain_v2(plain: Served, trees: Served, group: str) -> None:
    assert_equal(trees.answers[group], plain.answers[group])


@pytest.mark.slow
def test_trees_were_verified(trees: Served) -> None:
    seen, metrics = trees.seen, trees.metrics
    assert seen["attention"] == "CPUTreeAttention"
    assert min(seen[what] for what in ("whole", "mixed", "moves", "at_once", "levels")) > 0, seen
    assert metrics["vllm:spec_decode_num_accepted_tokens"] / metrics["vllm:spec_decode_num_drafts"] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("group", [*GROUPS, "aborts", "misled"])
def test_asynchronous_scheduling_with_an_adaptive_budget_is_exact(plain: Served, adaptive: Served, group: str) -> None:
    assert_equal(adaptive.answers[group], plain.answers["first" if group == "misled" else group])


@pytest.mark.slow
def test_an_asynchronous_budget_follows_the_drafter(adaptive: Served) -> None:
    nodes, useful_steps = adaptive.seen["nodes"], adaptive.seen["useful_steps"]
    useful, misled = nodes[:useful_steps], nodes[useful_steps:]
    assert adaptive.seen["moves"] > 0
    # Steps without nodes, with some and with all.
    assert useful.count(0) > 10 and useful.count(NUM_NODES * NUM_PROMPTS) > 10
    assert len(set(useful)) > 6
    # The budget still tries a single node now and then.
    quarter = len(misled) // 4
    assert quarter > 5 and max(misled[-quarter:]) < max(misled[:quarter]) / 2


@pytest.mark.slow
def test_gpu_kernels_are_exact_and_the_host_does_not_wait_for_the_device(
    pair: TinyPair, prompts: list[list[int]], tmp_path: Path, plain: Served
) -> None:
    names = ("top-p and top-k", "penalties")
    groups = {name: GROUPS[name] for name in names}
    served = serve(
        tmp_path, job_of(pair, prompts, tmp_path, "triton", spec=spec_of(pair), worker=TRITON, groups=groups)
    )
    for name in names:
        assert_equal(served.answers[name], plain.answers[name])
    assert served.seen["attention"] == "TritonTreeAttention"
    assert served.seen["moves"] > 0 and served.seen["waits"] == []


@pytest.mark.slow
def test_several_kv_groups_are_exact_with_preemption_and_cached_prefixes(
    pair: TinyPair, prompts: list[list[int]], tmp_path: Path
) -> None:
    """One layer of the target has a window."""
    # The cache is too small for all requests with their answers; the prompts begin with the same text.
    shared = [prompts[2] + prompts[0] + prompt[:3] for prompt in prompts]
    params = [
        {"temperature": 0.8 * (index % 2), "seed": index, "max_tokens": 40, "ignore_eos": True} for index in range(4)
    ]
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    options = {"num_gpu_blocks_override": 22, "hf_overrides": windows}
    fields = {"groups": {"first": params, "second": params}, "options": options}
    plain = serve(tmp_path, job_of(pair, shared, tmp_path, "plain-groups", **fields))
    trees = serve(tmp_path, job_of(pair, shared, tmp_path, "groups", spec=spec_of(pair), worker=WATCHED, **fields))
    for name in ("first", "second"):
        assert_equal(trees.answers[name], plain.answers[name])
    assert trees.metrics["vllm:num_preemptions"] > 0 and trees.metrics["vllm:prefix_cache_hits"] > 0


@pytest.mark.slow
def test_preempted_requests_and_cached_prefixes_are_exact_with_an_adaptive_budget(
    pair: TinyPair, prompts: list[list[int]], shared: dict[str, list[list[int]]], tmp_path: Path, plain: Served
) -> None:
    # The cache holds two requests with their answers, or four prompts.
    fields = {"groups": SHARED, "other_prompts": shared, "options": {"num_gpu_blocks_override": 7}}
    spec = spec_of(pair, adaptive_budget=True)
    trees = serve(tmp_path, job_of(pair, prompts, tmp_path, "trees", spec=spec, worker=RULED, **fields))
    for name in SHARED:
        assert_equal(trees.answers[name], plain.answers[name])
    metrics = trees.metrics
    assert metrics["vllm:num_preemptions"] > 0 and metrics["vllm:prefix_cache_hits"] > 0
    assert 0 < metrics["vllm:spec_decode_num_draft_tokens"] < NUM_NODES * metrics["vllm:spec_decode_num_drafts"]


@pytest.mark.slow
def test_adapters_thinking_budgets_and_processors_of_a_user_are_exact(
    pair: TinyPair, prompts: list[list[int]], tmp_path: Path
) -> None:
    adapters = [None, *(write_adapter(tmp_path / f"adapter-{seed}", seed).lora_path for seed in (1, 2))]
    fields = {
        "groups": {
            "thoughts": kinds(
                *({"temperature": 0.7 * (size % 2), "thinking_token_budget": size} for size in (0, 1, 3))
            ),
            "adapters": kinds({"temperature": 0, "logprobs": 1}, {"temperature": 0.8}),
        },
        "adapters": adapters,
        "options": {
            # The tiny target writes these texts, so that thoughts begin and end in prompts and in answers.
            "reasoning_config": {"reasoning_start_str": "(", "reasoning_end_str": "):\n"},
            "logits_processors": ["tests.engine.v2.processors:AvoidRepeat"],
            **LORA,
        },
    }
    plain = serve(tmp_path, job_of(pair, prompts, tmp_path, "plain", **fields))
    trees = serve(tmp_path, job_of(pair, prompts, tmp_path, "trees", spec=spec_of(pair), worker=WATCHED, **fields))
    for name in fields["groups"]:
        assert_equal(trees.answers[name], plain.answers[name])
    assert trees.seen["levels"] > 0 and trees.seen["moves"] > 0


@pytest.mark.slow
def test_two_ranks_answer_as_plain_v2_on_one_rank(
    pair: TinyPair, prompts: list[list[int]], tmp_path: Path, plain: Served
) -> None:
    names = ("penalties", "log probabilities")
    fields = {
        "groups": {name: GROUPS[name] for name in names},
        "options": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    }
    # Adaptive, because ranks with different decisions would wait for each other.
    spec = spec_of(pair, adaptive_budget=True)
    trees = serve(
        tmp_path, job_of(pair, prompts, tmp_path, "trees", spec=spec, worker=RULED, async_scheduling=True, **fields)
    )
    for name in names:
        assert_equal(trees.answers[name], plain.answers[name])
    assert trees.metrics["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "is_async"), [({"num_speculative_tokens": 63}, False), ({"tree": "template"}, True)], ids=str
)
def test_trees_are_exact_up_to_the_end_of_the_context(
    pair: TinyPair, prompts: list[list[int]], tmp_path: Path, short_plain: Served, spec: dict[str, Any], is_async: bool
) -> None:
    ours = spec_of(pair, **spec)
    job = job_of(pair, prompts, tmp_path, "trees", spec=ours, worker=WATCHED, async_scheduling=is_async, **SHORT)
    trees = serve(tmp_path, job)
    for name in SHORT["groups"]:
        assert_equal(trees.answers[name], short_plain.answers[name])
    assert trees.answers["short"][0]["finish_reason"] == "length"
    assert trees.seen["levels"] > 0 and trees.seen["at_once"] > 0
