"""End to end: `vllm serve` as a process, the openai client, several requests at once."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from vllm import LLM, SamplingParams

from benchmarks.server import BINARIES, NAME, server
from benchmarks.soak import Answer, Tally, ask_offline, ask_server, gauges_at, left_over, make_asks
from tests.engine.conftest import IN_CORE
from tests.engine.test_soak import TOUCHED_LATER
from tests.tiny_pair import TinyPair

FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 27)]
PROMPTS = ["import os\n\n\ndef ", "class Reader:\n    def __init__(self", "for line in ", "try:\n    import "]


def answers_of(plain: LLM) -> dict[str, list[str]]:
    """Expected answers, by the keys of `ask_everything`."""
    greedy = SamplingParams(temperature=0, max_tokens=40)
    sampled = SamplingParams(temperature=0.8, seed=5, max_tokens=40)
    chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    outputs = {
        "whole": plain.generate(PROMPTS, greedy, use_tqdm=False),
        "seeded": plain.generate(PROMPTS, sampled, use_tqdm=False),
        "chat": plain.chat(chats, greedy, use_tqdm=False),
    }
    texts = {key: [each.outputs[0].text for each in answers] for key, answers in outputs.items()}
    return {**texts, "streamed": texts["whole"]}


async def ask_everything(url: str) -> dict[str, list[str]]:
    """Answers by kind of request; all requests of a kind are in flight at once."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")

    async def whole(prompt: str, **options: float) -> str:
        answer = await client.completions.create(model=NAME, prompt=prompt, max_tokens=40, **options)
        assert answer.choices[0].finish_reason in ("stop", "length")
        return answer.choices[0].text

    async def streamed(prompt: str) -> str:
        pieces = []
        stream = await client.completions.create(model=NAME, prompt=prompt, max_tokens=40, temperature=0, stream=True)
        async for chunk in stream:
            pieces.append(chunk.choices[0].text)
        return "".join(pieces)

    async def chat(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        answer = await client.chat.completions.create(model=NAME, messages=messages, max_tokens=40, temperature=0)
        return answer.choices[0].message.content or ""

    return {
        "whole": list(await asyncio.gather(*(whole(prompt, temperature=0) for prompt in PROMPTS))),
        "streamed": list(await asyncio.gather(*(streamed(prompt) for prompt in PROMPTS))),
        "seeded": list(await asyncio.gather(*(whole(prompt, temperature=0.8, seed=5) for prompt in PROMPTS))),
        "chat": list(await asyncio.gather(*(chat(prompt) for prompt in PROMPTS))),
    }


def bench_serve(url: str, pair: TinyPair, folder: Path) -> dict[str, Any]:
    """Results of `vllm bench serve` with PROMPTS."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = [str(BINARIES / "vllm"), "bench", "serve", "--base-url", url, "--model", NAME]
    command += ["--tokenizer", str(pair.target), "--dataset-name", "custom", "--num-prompts", str(len(PROMPTS))]
    command += ["--dataset-path", str(folder / "prompts.jsonl"), "--custom-output-len", "40", "--temperature", "0"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_a_server_answers_as_plain_vllm_does_and_reports_its_trees(pair: TinyPair, plain: LLM, tmp_path: Path) -> None:
    expected = answers_of(plain)
    record = tmp_path / "rows.jsonl"
    spec = json.dumps({"adaptive_budget": False, "record": str(record)})
    trees = ["--speculative-model", str(pair.drafter), "--spec-tokens", "16", "-sc", spec]
    with server(pair.target, tmp_path / "ctc.log", *FLAGS, *trees) as running:
        url = running.url
        assert asyncio.run(ask_everything(url)) == expected
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        time.sleep(3)
        metrics = httpx.get(f"{url}/metrics").text
        benchmark = bench_serve(url, pair, tmp_path)
    answers = plain.get_tokenizer().batch_decode([row["token_ids"] for row in rows], skip_special_tokens=True)
    assert sorted(answers) == sorted(text for texts in expected.values() for text in texts)
    assert benchmark["completed"] == len(PROMPTS)
    assert 1 < benchmark["spec_decode_acceptance_length"] <= 9
    assert benchmark["spec_decode_accepted_tokens"] <= benchmark["spec_decode_draft_tokens"]

    def counter(name: str) -> float:
        return float(re.search(rf"^vllm:spec_decode_num_{name}_total{{.*}} (\S+)$", metrics, re.MULTILINE)[1])

    assert counter("accepted_tokens") > 0
    assert counter("draft_tokens") <= 16 * counter("drafts")
    assert re.search(r'^ctc_spec:nodes_per_step{engine="0"} [1-9]', metrics, re.MULTILINE)
    assert re.search(r'^ctc_spec:acceptance_by_depth{.*depth="1".*} [01]\.\d', metrics, re.MULTILINE)
    log = (tmp_path / "ctc.log").read_text()
    assert re.search(r"Mean acceptance length: [1-9]", log)
    assert re.search(r"CTC trees: acceptance length [1-9]", log)


@pytest.mark.slow
def test_two_engines_of_a_data_parallel_server_answer_as_plain_vllm_does(
    pair: TinyPair, plain: LLM, prompts: list[list[int]], tmp_path: Path
) -> None:
    """With the short form of benchmarks/soak.py."""
    asks, expected = make_asks(prompts, 90, 60, compare_every=3), dict[int, Answer | None]()
    ask_offline(plain, {number: ask for number, ask in asks.items() if number % 3 == 0}, 1, expected.__setitem__)
    spec = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": 16, "adaptive_budget": False}
    # One API server, because each one imports everything again.
    parallel = ["--data-parallel-size", "2", "--api-server-count", "1", "--distributed-executor-backend", IN_CORE]
    with server(pair.target, tmp_path / "ctc.log", *FLAGS, *parallel, "-sc", json.dumps(spec)) as running:
        tally = Tally(expected, running.pid, warm_up=30)
        asyncio.run(ask_server(running.url, asks, 12, tally))
        asyncio.run(ask_server(running.url, {0: asks[0]}, 1, tally))
        metrics = httpx.get(f"{running.url}/metrics").text
        left, growth = left_over(gauges_at(running.url)), tally.growth()
    assert tally.num_compared == 31 and tally.different == []
    assert tally.num_aborted > 5 and left == {}
    assert growth < TOUCHED_LATER
    accepted = re.findall(
        r'^vllm:spec_decode_num_accepted_tokens_total{.*engine="(\d)".*} (\S+)$', metrics, re.MULTILINE
    )
    assert {engine for engine, count in accepted if float(count) > 0} == {"0", "1"}


def test_a_bad_drafter_stops_the_server_with_one_clear_error(pair: TinyPair) -> None:
    spec = '{"method": "ctc", "model": "no/such/drafter", "num_speculative_tokens": 8}'
    done = subprocess.run(
        [str(BINARIES / "vllm"), "serve", str(pair.target), "-sc", spec], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "drafter 'no/such/drafter' is not a folder" in done.stderr + done.stdout
