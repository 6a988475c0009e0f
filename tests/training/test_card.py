"""The model card says what was recorded, and nothing of the machine's folders."""

import json
import sys

import pytest

from tests.training.tiny_models import tiny_drafter, tiny_target
from vllm_ctc_spec.training.card import CardDetails, command_line, training_facts, write_card
from vllm_ctc_spec.training.data import TrainingRow
from vllm_ctc_spec.training.evaluate import CHAIN, Evaluation, Rate, TreeAcceptance
from vllm_ctc_spec.training.stages import named_sets

NO_DETAILS = CardDetails()


def evaluation(length: float, error: float | None) -> Evaluation:
    trees = tuple(TreeAcceptance(CHAIN[0], nodes, length + nodes / 100, error, length, (0.5,) * 4) for nodes in (4, 63))
    return Evaluation(trees, (), Rate(None, 0), Rate(None, 0), 40, 5, 0)


@pytest.fixture
def drafter(tmp_path, monkeypatch):
    folder = tmp_path / "drafter"
    tiny_drafter(tiny_target()).save_pretrained(folder)
    monkeypatch.setattr(
        sys, "argv", ["/usr/bin/vllm-ctc-spec", "train", "all", str(folder), f"a={folder}", "--steps=3"]
    )
    return folder


def rows():
    import torch

    return [TrainingRow(torch.arange(5), torch.tensor([False, True, True, True, False]))] * 2


def written(drafter, words=NO_DETAILS, sets=None, target="org/name"):
    path = drafter / "README.md"
    write_card(path, drafter, target, words, sets or {"one": evaluation(2.0, 0.1)})
    return path.read_text()


def test_what_training_recorded_stands_in_the_card(drafter):
    record = {"steps": 1234, "seconds": 630.0, **training_facts(rows())}
    assert (record["num_rows"], record["num_tokens"]) == (2, 6)
    (drafter / "training.json").write_text(json.dumps(record))
    card = written(drafter, CardDetails(text="its own answers, Apache-2.0"))
    for fact in (
        "| text | its own answers, Apache-2.0 |",
        "| rows | 2, 6 trained tokens |",
        "| command | `vllm-ctc-spec train all drafter a=drafter --steps=3` |",
        "| steps | 1,234 |",
        "| time | 10 minutes |",
        record["machine"]["cpu"],
        "vllm serve org/name --spec-model drafter --spec-tokens 32",
    ):
        assert fact in card
    assert str(drafter.parent) not in card


def test_the_drafter_that_a_fit_started_from_stands_in_the_card(drafter):
    assert "first weights" not in written(drafter)
    before = {"steps": 793, "seconds": 4500.0, "num_rows": 3025, "num_tokens": 719288}
    (drafter / "training.json").write_text(json.dumps({"steps": 1, "before": before}))
    card = written(drafter)
    assert "| first weights | those of another drafter: rows 3,025, 719,288 trained tokens; steps 793; time 75 " in card
    (drafter / "training.json").write_text(json.dumps({"steps": 1, "before": {}}))
    assert "| first weights | those of another drafter, not recorded |" in written(drafter)


@pytest.mark.parametrize(
    ("layers", "words"), [([], "the last hidden state |"), ([1], "the last hidden state and the outputs of layers 1 |")]
)
def test_the_layers_that_are_read_stand_in_the_card(drafter, layers, words):
    tiny_drafter(tiny_target(), target_layers=layers).save_pretrained(drafter)
    assert f"| reads of the target | {words}" in written(drafter)


def test_each_set_has_a_column(drafter):
    card = written(drafter, sets={"gsm8k": evaluation(2.0, 0.1), "mt-bench": evaluation(1.5, None)})
    assert "| tree | nodes | gsm8k (5 rows) | mt-bench (5 rows) |" in card
    assert "| chain | 63 | 2.63 ± 0.10 | 2.13 |" in card


def test_words_are_kept_for_the_next_card(drafter):
    assert "# CTC drafter for Big" in written(drafter, CardDetails("Big", "poems"))
    again = written(drafter)
    assert "# CTC drafter for Big" in again and "| text | poems |" in again


def test_what_was_not_recorded_is_said_so(drafter):
    card = written(drafter, target=str(drafter.parent))
    assert "| command | not recorded |" in card and "| time | not recorded |" in card
    assert f"# CTC drafter for {drafter.parent.name}\n" in card


def test_a_process_that_is_python_is_called_by_the_commands_name():
    assert command_line(["/x/vllm_ctc_spec/cli.py", "train", "--text=two words"]) == (
        "vllm-ctc-spec train '--text=two words'"
    )


def test_sets_are_named_by_the_user_or_by_their_file(tmp_path):
    odd = tmp_path / "a=b.jsonl"
    odd.touch()
    assert named_sets(["gsm=x/rows.jsonl", "y/other.jsonl", str(odd)]) == {
        "gsm": "x/rows.jsonl",
        "other": "y/other.jsonl",
        "a=b": str(odd),
    }
    with pytest.raises(ValueError, match="two sets are called 'rows'"):
        named_sets(["a/rows.jsonl", "b/rows.jsonl"])
    with pytest.raises(ValueError, match="write NAME=ROWS"):
        named_sets(["=rows.jsonl"])
