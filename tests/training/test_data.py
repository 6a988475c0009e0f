"""Rows, what of them is trained, and the errors of bad lines."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_ctc_spec.training.data import AnchorCollator, RowDataset, TrainingRow, read_prompts, read_rows

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character, so that a test can read the ids."""
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(32, 127)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=TEMPLATE)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def spelled(row: TrainingRow) -> tuple[str, str]:
    """The row's text, and the part of it that is trained."""
    return "".join(map(chr, row.token_ids)), "".join(map(chr, row.token_ids[row.trained]))


MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


def test_only_assistant_turns_are_trained(tokenizer, tmp_path):
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"messages": MESSAGES}), tokenizer, 100)
    assert spelled(row) == ("<user>hi<assistant>yes|<user>so<assistant>no|", "yes|no|")


def test_text_is_trained_whole_and_cut_into_windows(tokenizer, tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", {"text": "abcdefg"}, "", {"text": "xy"}), tokenizer, 3)
    assert [spelled(row) for row in rows] == [("abc", "abc"), ("def", "def"), ("g", "g"), ("xy", "xy")]


def test_of_regenerated_rows_only_the_continuation_is_trained(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt_token_ids": [65, 66], "token_ids": [67, 68]})
    assert [spelled(row) for row in read_rows(path, tokenizer, 100)] == [("ABCD", "CD")]


def test_prompts_of_every_kind(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "ab"}, {"prompt_token_ids": [65]}, {"messages": MESSAGES})
    texts = ["".join(map(chr, prompt)) for prompt in read_prompts(path, tokenizer)]
    assert texts == ["ab", "A", "<user>hi<assistant>yes|<user>so<assistant>"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ("[1]", "is list, not a JSON object"),
        ({"txt": "a"}, r"needs 'messages', 'text', or .* has \['txt'\]"),
        ({"text": 3}, "'text' must be a string, is int"),
        ({"token_ids": [1]}, "'prompt_token_ids' must be a list of token ids"),
        ({"messages": [{"content": "a"}]}, "'messages' must be a list of objects with 'role' and 'content'"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tokenizer, tmp_path, line, problem):
    path = write(tmp_path / "bad.jsonl", {"text": "good"}, line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: {problem}"):
        read_rows(path, tokenizer, 100)


def test_a_missing_file_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl' cannot be read"):
        read_rows(tmp_path / "none.jsonl", tokenizer, 100)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": MESSAGES})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ messages | length }}" + TEMPLATE
    )
    with pytest.raises(ValueError, match="line 1: message 1 is rendered differently"):
        read_rows(path, tokenizer, 100)


def test_anchors_are_usable_iff_they_and_their_labels_are_trained():
    trained = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    row = TrainingRow(torch.arange(9), trained)
    assert row.usable_anchors(2).tolist() == [1, 5, 6]
    assert row.usable_anchors(8).tolist() == []
    assert len(RowDataset([row, row], label_length=4)) == 0


def test_batches_carry_the_tokens_that_follow_each_anchor():
    rows = [TrainingRow(torch.arange(10, 10 + n), torch.ones(n, dtype=torch.bool)) for n in (12, 5)]
    batch = AnchorCollator(anchors_per_row=4, label_length=3)(rows)
    assert batch["input_ids"].shape == (2, 12)
    assert batch["valid"].sum(1).tolist() == [4, 1]
    for row, column in batch["valid"].nonzero().tolist():
        anchor = int(batch["anchors"][row, column])
        assert batch["labels"][row, column].tolist() == [10 + anchor + offset for offset in (1, 2, 3)]
    assert len(set(batch["anchors"][0].tolist())) == 4
