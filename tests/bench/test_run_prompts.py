from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.word_tokenizer import word_tokenizer, words_of
from vllm_ctc_spec.bench.cells import Prompt, spread
from vllm_ctc_spec.bench.config import PromptSource
from vllm_ctc_spec.bench.run import next_turn, select_questions
from vllm_ctc_spec.training.prompts import Question


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def read(tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], **selection: Any) -> list[Question]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return select_questions("rows", PromptSource(str(path), **selection), tokenizer)


def test_two_turns_hold_the_first_answer(tmp_path: Path, tokenizer: Any):
    rows = [{"question_id": 81, "category": "writing", "turns": ["one two", "three"]}]
    [question] = read(tmp_path, tokenizer, rows)
    first = next_turn("rows", question, [], tokenizer)
    assert first is not None and (first.name, first.category) == ("81, turn 1", "writing")
    assert words_of(tokenizer, first.token_ids) == "user : one two assistant :"
    second = next_turn("rows", question, [tokenizer("four five")["input_ids"]], tokenizer)
    assert second is not None and second.name == "81, turn 2"
    assert words_of(tokenizer, second.token_ids) == "user : one two assistant : four five user : three assistant :"
    assert next_turn("rows", question, [[1], [1]], tokenizer) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "one two"}, "user : solve one two assistant :"),
        ({"question_id": 3, "category": "qa", "turns": ["one"]}, "user : solve one assistant :"),
        ({"prompt": "one two"}, "solve one two"),
        ({"text": "six"}, "solve six"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "user : a assistant :",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "user : a assistant :",
        ),
        ({"prompt_token_ids": [4, 5]}, "one two"),
    ],
)
def test_every_layout_is_read(tmp_path: Path, tokenizer: Any, row: dict[str, Any], expected: str):
    [question] = read(tmp_path, tokenizer, [row], prefix="solve ")
    assert words_of(tokenizer, question.first) == expected
    prompt = next_turn("rows", question, [], tokenizer)
    assert prompt is not None and prompt.category == row.get("category", "rows")


def test_without_a_chat_template_turns_are_lines(tmp_path: Path, tokenizer: Any):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    [question] = read(tmp_path, bare, [{"question": "one two"}])
    assert words_of(bare, question.first) == "one two"


@pytest.mark.parametrize(
    ("selection", "expected"),
    [({"skip": 1, "limit": 2}, ["1", "2"]), ({"last": 2}, ["3", "4"]), ({"limit": 1}, ["0"]), ({"skip": 4}, ["4"])],
)
def test_rows_are_selected(tmp_path: Path, tokenizer: Any, selection: dict[str, int], expected: list[str]):
    rows = [{"question_id": index, "question": "one"} for index in range(5)]
    assert [question.name for question in read(tmp_path, tokenizer, rows, **selection)] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": []}, "line 1: 'turns' must be a list"),
        ({"question": 3}, "'question' must be a string, is int"),
        ({"answer": "a"}, "line 1: needs 'turns'"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "no message before"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, tokenizer: Any, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, tokenizer, [row])


def test_an_empty_selection_is_refused(tmp_path: Path, tokenizer: Any):
    with pytest.raises(ValueError, match="none of its 1 rows"):
        read(tmp_path, tokenizer, [{"question": "one"}], skip=1)


def test_a_cell_takes_prompts_from_all_over():
    prompts = [Prompt(str(index), "c", (index,)) for index in range(10)]
    assert [prompt.name for prompt in spread(prompts, 4)] == ["0", "2", "5", "7"]
    assert spread(prompts, 10) == prompts


def test_a_subset_and_a_split_of_a_data_set_are_chosen(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "questions"
    folder.mkdir()
    configs = ["---", "configs:"]
    for subset, text in (("main", "one"), ("other", "two")):
        (folder / f"{subset}.jsonl").write_text(json.dumps({"question": text}) + "\n")
        files = f"data_files: [{{split: test, path: {subset}.jsonl}}]"
        configs += [f"- config_name: {subset}", f"  {files}"]
    (folder / "README.md").write_text("\n".join([*configs, "---", ""]))
    [question] = select_questions("q", PromptSource(str(folder), subset="other"), tokenizer)
    assert words_of(tokenizer, question.first) == "user : two assistant :"
    with pytest.raises(ValueError, match=r"has no split 'train', only \['test'\]"):
        select_questions("q", PromptSource(str(folder), subset="main", split="train"), tokenizer)
