"""`record` writes what the engine `trees` serves as training rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from tests.engine.conftest import FIRST_ROW, generate
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.cli import main
from vllm_ctc_spec.engine import recording


def rows_of(record: Path) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in record.read_bytes().splitlines()]


def row(prompt: list[int], token_ids: Any) -> dict[str, list[int]]:
    return {"prompt_token_ids": prompt, "token_ids": list(token_ids)}


def rows_from(outputs: list[RequestOutput]) -> list[dict[str, list[int]]]:
    return [row(output.prompt_token_ids, answer.token_ids) for output in outputs for answer in output.outputs]


@pytest.fixture
def new_file(trees: LLM, record: Path) -> Iterator[Path]:
    """The path of the record, whose file is moved away during a test."""
    kept = record.with_suffix(".kept")
    record.rename(kept)
    yield record
    os.replace(kept, record)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(recording.logger, "warning_once", lambda text, *values: lines.append(text % values))
    return lines


def test_rows_are_appended_to_existing_rows(
    pair: TinyPair, trees: LLM, record: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    earlier = rows_of(record)
    assert earlier[0] == FIRST_ROW
    limits = SamplingParams(temperature=0, max_tokens=40)
    # At a stop string vLLM aborts the request in the engine core.
    strings = SamplingParams(temperature=0, max_tokens=40, stop=["e", "("])
    several = SamplingParams(temperature=0.8, n=3, seed=1, max_tokens=20)
    outputs = generate(trees, prompts[:12], [limits, strings, several] * 4)
    assert {answer.finish_reason for output in outputs for answer in output.outputs} == {"length", "stop"}
    expected = [each for each in rows_from(outputs) if len(each["token_ids"]) > 1]
    assert len(expected) > 12
    new = rows_of(record)[len(earlier) :]
    assert sorted(new, key=str) == sorted(expected, key=str)

    drafter = str(tmp_path / "drafter")
    assert main(["train", "fit", str(pair.target), str(record), drafter, "--dry-run"]) == 0


def test_aborted_requests_and_answers_of_one_token_are_left_out(
    trees: LLM, record: Path, prompts: list[list[int]]
) -> None:
    num_earlier = len(rows_of(record))
    engine = trees.llm_engine
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    single = SamplingParams(temperature=0, max_tokens=1)
    for name, params in {"whole": long, "aborted": long, "single": single}.items():
        engine.add_request(name, {"prompt_token_ids": prompts[0]}, params)
    for _ in range(3):
        engine.step()
    engine.abort_request(["aborted"])
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    [whole] = [output for output in outputs if output.finished]
    assert len(whole.outputs[0].token_ids) == 60
    assert rows_of(record)[num_earlier:] == rows_from([whole])


def test_a_full_file_takes_no_row_until_it_is_moved_away(
    trees: LLM, new_file: Path, prompts: list[list[int]], warnings: list[str]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    line = json.dumps(FIRST_ROW).encode() + b"\n"
    new_file.write_bytes(line * (64_000_000 // len(line)))
    size = new_file.stat().st_size
    [output] = generate(trees, prompts[:1], params)
    assert new_file.stat().st_size == size
    assert warnings == [f"{new_file} has reached record_limit_mb=64: answers are not recorded until it is moved away."]
    new_file.rename(new_file.with_suffix(".full"))
    generate(trees, prompts[:1], params)
    assert rows_of(new_file) == rows_from([output])
    assert new_file.stat().st_mode & 0o077 == 0


def test_answers_are_served_where_the_file_cannot_be_written(
    trees: LLM, new_file: Path, prompts: list[list[int]], warnings: list[str]
) -> None:
    new_file.mkdir()
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    [output] = generate(trees, prompts[:1], params)
    new_file.rmdir()
    assert len(output.outputs[0].token_ids) == 10
    assert warnings == [f"{new_file} cannot be written (Is a directory): answers are not recorded."]


def test_record_is_refused_with_the_rust_frontend(
    pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    spec = {"method": "ctc", "model": str(pair.drafter), "record": str(tmp_path / "rows.jsonl")}
    arguments = EngineArgs(model=str(pair.target), speculative_config=spec)
    with pytest.raises(ValueError, match=r"VLLM_USE_RUST_FRONTEND=1 with .*rows\.jsonl'.* Unset"):
        arguments.create_engine_config()
    assert not any(tmp_path.iterdir())
