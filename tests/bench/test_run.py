"""A benchmark run without engines: cells, resume, failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from vllm_ctc_spec.bench import run as run_module
from vllm_ctc_spec.bench.command import one_line_per_stage
from vllm_ctc_spec.bench.config import BenchConfig, load_config
from vllm_ctc_spec.bench.records import EngineFacts, Gap, Pass, Request, Workload
from vllm_ctc_spec.bench.run import Bench, flatten

CONFIG = """
target: target
engine: {max_model_len: 64}
methods:
  plain: null
  ngram: {method: ngram, num_speculative_tokens: 5}
  suffix: {method: suffix}
prompts: {words: words.jsonl, talk: talk.jsonl}
batch_sizes: [1, 2]
num_prompts: 1
max_tokens: 8
rounds: 2
"""
TURNS = "plain vLLM answers turn 1 of talk"


class FakeFleet:
    """Answers prompt [..., x] with x, x + 1. ngram is wrong after prompts that end in 3; suffix fails at batch 2."""

    started: list[str]
    works: list[Workload]
    config: BenchConfig

    def __init__(self, config: BenchConfig, logs: Path) -> None:
        type(self).config = config
        self.methods, self.errors = list(config.methods), {}
        self.facts = {method.name: EngineFacts("float32", 64, False) for method in config.methods}

    def __enter__(self) -> FakeFleet:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def start(self, report: Any) -> None:
        for method in self.methods:
            report(method)
        type(self).started += [method.name for method in self.methods]

    @property
    def alive(self) -> list[Any]:
        return [method for method in self.methods if method.name not in self.errors]

    def call(self, name: str, command: str, **arguments: Any) -> Any:
        if command == "gaps":
            return [Gap(0.5, 20.0) for _ in arguments["branchings"]]
        if command != "run":
            return 1 << 20
        work: Workload = arguments["workload"]
        type(self).works.append(work)
        if name == "suffix" and work.batch_size == 2:
            self.errors[name] = "RuntimeError: gone"
            return None
        answers = [(p[-1], p[-1] + 1 + (name == "ngram" and p[-1] == 3)) for p in work.prompts]
        return Pass(1.0, tuple(Request(answer, 2, 0.5, 0.1, 0.4, None) for answer in answers))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    words = Tokenizer(models.WordLevel({str(index): index for index in range(30)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "target")
    LlamaConfig(vocab_size=30, max_position_embeddings=2048).save_pretrained(tmp_path / "target")
    (tmp_path / "words.jsonl").write_text('{"prompt": "1 2"}\n{"prompt": "2 3"}\n')
    (tmp_path / "talk.jsonl").write_text('{"question_id": 7, "category": "c", "turns": ["4 5", "6"]}\n')
    FakeFleet.started, FakeFleet.works = [], []
    monkeypatch.setattr(run_module, "Fleet", FakeFleet)
    return tmp_path


def bench(folder: Path, text: str = CONFIG) -> Bench:
    path = folder / "bench.yaml"
    path.write_text(text)
    return Bench(load_config(path), folder / "out")


def quiet(title: str, done: int) -> None:
    pass


def test_every_cell_is_measured_and_judged(folder: Path):
    done: list[int] = []
    results = bench(folder).run(lambda title, count: done.append(count))
    assert [(cell["prompts"], cell["batch_size"]) for cell in results["cells"]] == [
        ("words", 1), ("words", 2), ("talk", 1), ("talk", 2),
    ]  # fmt: skip
    first, second = results["cells"][:2]
    assert (first["prompt_names"], second["prompt_names"]) == (["1"], ["1", "2"])
    assert first["methods"]["ngram"]["equality"]["exact"] is True
    equality = second["methods"]["ngram"]["equality"]
    assert (equality["exact"], equality["equal"], equality["different"]) == (False, 1, 1)
    assert equality["differences"][0] == {
        "prompt": 1,
        "position": 1,
        "gap": 0.5,
        "steps": 0.5 / (16 * 2**-23),
        "is_near_tie": False,
    }
    assert len(second["methods"]["plain"]["tokens_per_second"]) == 2
    assert json.loads((folder / "out" / "results.json").read_text()) == results


def test_engines_get_the_cache_that_the_prompts_need(folder: Path):
    results = bench(folder, CONFIG.replace("engine: {max_model_len: 64}\n", "")).run(quiet)
    plain, ngram, _ = (FakeFleet.config.engine_options(method) for method in FakeFleet.config.methods)
    assert (plain["max_model_len"], plain["max_num_seqs"]) == (1024, 2)
    assert plain["kv_cache_memory_bytes"] == ngram["kv_cache_memory_bytes"] > 0
    # The results record the user's settings, which have no cache size.
    assert results["config"]["engine"] == {}


def test_a_cells_sampling_reaches_the_engines(folder: Path):
    text = CONFIG + "sampling: [{temperature: 0}, {temperature: 0.2, top_p: 0.9}]\n"
    run = bench(folder, text.replace("[1, 2]", "[1]"))
    assert [run.path(cell).name for cell in run.cells()[:2]] == [
        "words-batch1-temperature0.json", "words-batch1-temperature0.2-top-p0.9.json",
    ]  # fmt: skip
    assert [cell["sampling"] for cell in run.run(quiet)["cells"][:2]] == [
        {"temperature": 0.0, "top_p": 1.0}, {"temperature": 0.2, "top_p": 0.9},
    ]  # fmt: skip
    assert {(work.temperature, work.top_p) for work in FakeFleet.works} == {(0.0, 1.0), (0.2, 0.9)}
    assert bench(folder, text.replace("[1, 2]", "[1]")).pending() == []


def test_a_methods_own_memory_is_left_alone(folder: Path):
    text = CONFIG.replace("ngram: {", "ngram: {engine: {gpu_memory_utilization: 0.3}, ")
    bench(folder, text).run(quiet)
    plain, ngram, _ = (FakeFleet.config.engine_options(method) for method in FakeFleet.config.methods)
    assert "kv_cache_memory_bytes" in plain and "kv_cache_memory_bytes" not in ngram
    assert ngram["gpu_memory_utilization"] == 0.3 and ngram["max_model_len"] == 64


def test_a_log_has_one_line_for_each_engine_and_each_cell(folder: Path, capsys: pytest.CaptureFixture[str]):
    bench(folder).run(one_line_per_stage())
    stages = [line.partition(" min: ")[2] for line in capsys.readouterr().out.splitlines()]
    cells = [f"{name}, batch {size}, temperature 0" for name in ("words", "talk") for size in (1, 2)]
    assert stages == [*(f"starting {name}" for name in ("plain", "ngram", "suffix")), TURNS, *cells]


def test_a_method_that_dies_is_reported_and_the_others_go_on(folder: Path):
    words_1, words_2, talk_1, _ = bench(folder).run(quiet)["cells"]
    assert "suffix" in words_1["methods"] and words_1["errors"] == {}
    for cell in (words_2, talk_1):
        assert set(cell["methods"]) == {"plain", "ngram"}
        assert cell["errors"] == {"suffix": "RuntimeError: gone"}


def test_the_second_turn_holds_plain_vllms_answer(folder: Path):
    cell = bench(folder).run(quiet)["cells"][3]
    assert cell["prompt_names"] == ["7, turn 1", "7, turn 2"]
    assert json.loads((folder / "out" / "cells" / "talk-turns.json").read_text()) == [[[5, 6]]]


def test_only_the_answers_that_are_needed_are_given(folder: Path):
    talk = [{"question_id": number, "turns": [f"{number}", "6"]} for number in range(10)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    text = (
        CONFIG.replace("words: words.jsonl, ", "").replace("num_prompts: 1", "num_prompts: 4").replace("[1, 2]", "[1]")
    )
    [cell] = bench(folder, text).run(quiet)["cells"]
    # The 20 turns have the numbers 0 to 19, of which 0, 5, 10 and 15 are measured.
    assert cell["prompt_names"] == ["0, turn 1", "2, turn 2", "5, turn 1", "7, turn 2"]
    assert len(FakeFleet.works[0].prompts) == 2


def test_a_run_goes_on_at_the_next_cell(folder: Path):
    whole = bench(folder).run(quiet)
    again = bench(folder)
    assert (again.pending(), again.run(quiet)["cells"]) == ([], whole["cells"])
    assert FakeFleet.started == ["plain", "ngram", "suffix"]
    lost = again.cells()[2]
    kept = {cell: again.path(cell).stat().st_mtime_ns for cell in again.cells() if cell != lost}
    again.path(lost).unlink()
    assert again.pending() == [lost]
    assert bench(folder).run(quiet)["cells"][2]["prompts"] == "talk"
    assert {cell: again.path(cell).stat().st_mtime_ns for cell in kept} == kept
    assert FakeFleet.started == ["plain", "ngram", "suffix"] * 2


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("rounds: 2", "rounds: 3", "rounds=2"),
        (
            "num_speculative_tokens: 5",
            "num_speculative_tokens: 4",
            "methods.ngram.speculative_config.num_speculative_tok",
        ),
        ("  suffix: {method: suffix}\n", "", "methods.suffix."),
    ],
)
def test_another_configuration_is_refused_by_name(folder: Path, old: str, new: str, name: str):
    bench(folder)
    with pytest.raises(ValueError, match=f"{name}.*delete the folder"):
        bench(folder, CONFIG.replace(old, new))


def test_other_prompts_are_refused(folder: Path):
    bench(folder)
    (folder / "words.jsonl").write_text('{"prompt": "1 2"}\n{"prompt": "2 4"}\n')
    with pytest.raises(ValueError, match=r"prompts\.words\.sha256"):
        bench(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_sizes: [1, 2]", "batch_sizes: [1, 4]", "prompts.words has 2 prompts, fewer than the batch size 4"),
        ("max_model_len: 64", "max_model_len: 3", "question 1 has 2 tokens, and the context holds 3"),
        ("max_model_len: 64", "max_model_length: 64", "unknown key 'max_model_length' in engine"),
        ("{method: suffix}", "{method: suffix, depth: 3}", "unknown key 'depth' in methods.suffix"),
    ],
)
def test_what_needs_the_target_is_checked_before_an_engine_starts(folder: Path, old: str, new: str, message: str):
    with pytest.raises(ValueError, match=message):
        bench(folder, CONFIG.replace(old, new))
    assert FakeFleet.started == []


def test_flat_settings_name_records_of_a_list():
    assert flatten({"a": {"b": 1}, "c": [], "m": [{"name": "x", "y": 2}]}) == {
        "a.b": 1,
        "c": [],
        "m.x.name": "x",
        "m.x.y": 2,
    }
