"""What the demo says of answers, over engines that need no model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_ctc_spec.bench.records import Drafts, Gap, Pass, Request
from vllm_ctc_spec.demo import show
from vllm_ctc_spec.demo.compare import (
    PROOF_QUESTIONS,
    AnsweredTurn,
    Comparison,
    acceptance_length,
    ask_in_turns,
    compare,
    read_demo_questions,
    same_in_float32,
)
from vllm_ctc_spec.demo.engines import CTC, NAMES, PLAIN, placements

TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"?": 0, "user": 1, "assistant": 2, "seven": 7, "eight": 8}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE)


class FakeEngines:
    """Plain vLLM says 7 8 7 8 in four seconds, the other one `ctc` in one; `gap` parts the tokens where they differ."""

    def __init__(self, ctc: tuple[int, ...] = (7, 8, 7, 8), gap: Gap | None = None) -> None:
        self.answers = {PLAIN: (7, 8, 7, 8), CTC: ctc}
        self.gap = gap
        self.asked: list[str] = []

    def one(self, name: str, command: str, **arguments: Any) -> Any:
        if command == "gaps":
            assert name == PLAIN
            return [self.gap for _ in arguments["branchings"]]
        self.asked.append(name)
        return self._pass(name, len(arguments["workload"].prompts))

    def both(self, command: str, arguments: dict[str, dict[str, Any]]) -> dict[str, Pass]:
        return {name: self._pass(name, len(arguments[name]["workload"].prompts)) for name in NAMES}

    def _pass(self, name: str, count: int) -> Pass:
        drafts = Drafts((0, 0, 0, 1), 9) if name == CTC else None
        seconds = 4.0 if name == PLAIN else 1.0
        tokens = self.answers[name]
        return Pass(seconds, (Request(tokens, len(tokens), seconds, 0.1, 0.5, drafts),) * count)


def answered(engines: FakeEngines, tokenizer: PreTrainedTokenizerFast) -> list[AnsweredTurn]:
    return list(ask_in_turns(engines, read_demo_questions(tokenizer), tokenizer))


def test_there_are_a_dozen_questions_of_many_kinds_and_one_has_two_turns(tokenizer: PreTrainedTokenizerFast):
    questions = read_demo_questions(tokenizer)
    assert len(questions) == 12
    assert len({question.category for question in questions}) >= 8
    assert sum(len(question.later_turns) for question in questions) == 1
    assert max(PROOF_QUESTIONS) < len(questions)


def test_each_engine_is_first_in_turn_and_a_second_turn_follows_plain_vllms_answer(tokenizer: PreTrainedTokenizerFast):
    engines = FakeEngines(ctc=(8, 8))
    turns = answered(engines, tokenizer)
    assert engines.asked[:4] == [PLAIN, CTC, CTC, PLAIN]
    first, second = (each for each in turns if "turn" in each.question)
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert second.prompt[len(first.prompt) :][:6] == (2, 7, 8, 7, 8, 1)


def test_equal_texts_and_their_figures(tokenizer: PreTrainedTokenizerFast):
    engines = FakeEngines()
    found = compare(engines, answered(engines, tokenizer), torch.bfloat16)
    assert found.texts == {"equal": 13, "near_tie": 0, "different": 0}
    assert found.tokens_per_second == {PLAIN: 1.0, CTC: 4.0}
    assert found.speedup == 4
    assert found.acceptance_length == 4
    assert all(row.text == "equal" and row.differs_at is None and row.speedup == 4 for row in found.rows)


@pytest.mark.parametrize(
    ("gap", "dtype", "text"),
    [
        (Gap(0.0, 20.0), torch.bfloat16, "near_tie"),
        (Gap(5.0, 20.0), torch.bfloat16, "different"),
        (Gap(0.0, 20.0), torch.float32, "different"),
        (None, torch.bfloat16, "different"),
    ],
)
def test_texts_that_part(tokenizer: PreTrainedTokenizerFast, gap: Gap | None, dtype: torch.dtype, text: str):
    engines = FakeEngines(ctc=(7, 8, 8, 8), gap=gap)
    found = compare(engines, answered(engines, tokenizer), dtype)
    assert found.texts[text] == 13
    assert {(row.text, row.differs_at) for row in found.rows} == {(text, 2)}


def test_sameness_in_float32_is_of_all_tokens(tokenizer: PreTrainedTokenizerFast):
    turns = answered(FakeEngines(), tokenizer)
    assert same_in_float32(FakeEngines(), turns)
    assert not same_in_float32(FakeEngines(ctc=(7, 8, 7)), turns)


def test_nothing_drafted_is_no_acceptance_length():
    assert acceptance_length([Request((1, 2), 2, 1.0, 0.1, 0.5, Drafts((0, 0), 0))]) is None


def comparison(tokenizer: PreTrainedTokenizerFast, engines: FakeEngines) -> Comparison:
    return compare(engines, answered(engines, tokenizer), torch.bfloat16)


def printed(write: Any) -> str:
    file = StringIO()
    write(Console(file=file, width=200))
    return file.getvalue()


def test_a_terminal_without_colours_gets_plain_lines(tokenizer: PreTrainedTokenizerFast):
    engines = FakeEngines(ctc=(7, 8, 8, 8), gap=Gap(0.0, 20.0))
    found = comparison(tokenizer, engines)
    text = printed(lambda console: show.table(console, found, 32))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("near-tie at 2") == 13
    assert "0 of 13 equal" in text
    assert "different tokens" not in printed(lambda console: show.conclusion(console, found, True, 3))
    assert "different tokens" in printed(lambda console: show.conclusion(console, found, False, 3))
    json.dumps(dataclasses.asdict(found))


def test_two_engines_that_start_at_once_use_both_of_two_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 5})
    assert [environment["VLLM_CPU_OMP_THREADS_BIND"] for environment in placements()] == ["2", "5"]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert placements() == ({}, {})


def test_it_needs_no_package_of_other_extras():
    code = (
        "import sys\n"
        "for name in ('accelerate', 'datasets', 'scipy', 'matplotlib'): sys.modules[name] = None\n"
        "import vllm_ctc_spec.cli, vllm_ctc_spec.demo.run, vllm_ctc_spec.bench.worker\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
