"""Rows, their trained tokens, and the errors of bad lines."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vllm_ctc_spec.training.data import (
    MISSING,
    AnchorDataset,
    SimilarRows,
    TrainingRow,
    collate_anchors,
    most_frequent,
    read_rows,
    with_anchors,
)
from vllm_ctc_spec.training.prompts import read_prompts, read_questions, turn_prompt
from vllm_ctc_spec.training.sources import Line

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception(m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}|{% endif %}{% endfor %}"
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

SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yes"},
    {"from": "user", "value": "so"},
    {"from": "bard", "value": "no"},
]


def test_only_assistant_turns_are_trained(tokenizer, tmp_path):
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"messages": MESSAGES}), tokenizer, 100)
    assert spelled(row) == ("<user>hi<assistant>yes|<user>so<assistant>no|", "yes|no|")


def test_sharegpt_conversations_are_their_messages(tokenizer, tmp_path):
    system = {"role": "system", "content": "be"}, {"from": "system", "value": "be"}
    path = write(
        tmp_path / "a.jsonl", {"messages": [system[0], *MESSAGES]}, {"conversations": [system[1], *SHAREGPT], "id": "7"}
    )
    plain, sharegpt = read_rows(path, tokenizer, 100)
    assert spelled(plain) == spelled(sharegpt) and spelled(plain)[1] == "yes|no|"
    prompt, same = read_prompts(path, tokenizer)
    assert prompt == same


def test_rows_do_not_depend_on_the_kind_of_source(tokenizer, tmp_path):
    layouts = [{"messages": MESSAGES}, {"conversations": SHAREGPT}, {"prompt_token_ids": [65], "token_ids": [66]}]
    lines = write(tmp_path / "a.jsonl", *layouts)
    array = write(tmp_path / "a.json", layouts)
    columns = {key: [layout.get(key) for layout in layouts] for layout in layouts for key in layout}
    pytest.importorskip("datasets").Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    expected = [spelled(row) for row in read_rows(lines, tokenizer, 100)]
    assert len(expected) == 3
    for source in (array, tmp_path / "saved", f"{tmp_path}/saved:train"):
        assert [spelled(row) for row in read_rows(source, tokenizer, 100)] == expected
        assert read_prompts(source, tokenizer) == read_prompts(lines, tokenizer)


def test_special_tokens_are_added_to_text_but_not_to_what_the_template_wrote(tokenizer, tmp_path):
    letters = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    letters.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", ord("^"))])
    adding = PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=TEMPLATE)
    path = write(tmp_path / "a.jsonl", {"text": "ab"}, {"messages": MESSAGES})
    assert [spelled(row)[0][0] for row in read_rows(path, adding, 100)] == ["^", "<"]
    path = write(tmp_path / "b.jsonl", {"prompt": "ab"}, {"messages": MESSAGES})
    assert [chr(prompt[0]) for prompt in read_prompts(path, adding)] == ["^", "<"]


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
        ({"txt": "a"}, r"needs 'messages', 'conversations', 'text', or .* has \['txt'\]"),
        ({"text": 3}, "'text' must be a string, is int"),
        ({"token_ids": [1]}, "'prompt_token_ids' must be a list of token ids"),
        ({"messages": [{"content": "a"}]}, "'messages' must be a list of objects with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages' must be a list of objects"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, r"the tokenizer's chat template refuses .*\(nobody\)"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, r"'conversations' has 'from' 'cat', must be one of"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "'conversations' must be a list of .* 'from' and"),
        ({"text": ""}, "'text' is empty"),
        ('{"text": "\\ud800"}', "has text that is not Unicode"),
        ({"prompt_token_ids": [], "token_ids": []}, "has no tokens"),
        ({"prompt_token_ids": [1], "token_ids": [-1]}, "has token id -1, must be from 0"),
        ({"prompt_token_ids": [127], "token_ids": [1]}, "has token id 127, must be from 0 to 126"),
        ({"prompt_token_ids": [True], "token_ids": [1]}, "'prompt_token_ids' must be a list of token ids"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tokenizer, tmp_path, line, problem):
    path = write(tmp_path / "bad.jsonl", {"text": "good"}, line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: {problem}"):
        read_rows(path, tokenizer, 100, vocab_size=127)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt_token_ids": []}, "has no tokens"),
        ({"prompt_token_ids": [-2]}, "has token id -2"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "has no message before the last assistant turn"),
        ({"answer": "a"}, r"needs 'turns', 'question', .* has \['answer'\]"),
        ({"turns": ["a", 3]}, "'turns' must be a list of texts"),
        ({"question": ""}, "'question' is empty"),
    ],
)
def test_a_bad_prompt_is_named_with_file_and_number(tokenizer, tmp_path, line, problem):
    path = write(tmp_path / "bad.jsonl", {"prompt": "good"}, "", line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 3: {problem}"):
        read_prompts(path, tokenizer)


def test_skipping_leaves_out_the_bad_lines_and_no_others(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", "{", {"text": "ab"}, "", {"txt": "a"}, {"text": "cd"}, {"text": ""})
    skipped: list[str] = []
    assert [spelled(row)[0] for row in read_rows(path, tokenizer, 100, skipped)] == ["ab", "cd"]
    assert [message.split(":")[0] for message in skipped] == [f"{path}, line {number}" for number in (1, 4, 6)]

    prompts: list[str] = []
    path = write(tmp_path / "b.jsonl", {"prompt": ""}, {"prompt": "x"}, "[")
    assert read_prompts(path, tokenizer, prompts) == [[ord("x")]]
    assert [message.split(":")[0] for message in prompts] == [f"{path}, line {number}" for number in (1, 3)]


@pytest.mark.parametrize(
    "read", [read_prompts, lambda source, tokenizer, skipped: read_rows(source, tokenizer, 100, skipped)]
)
@pytest.mark.parametrize("chat_template", [None, {"tool_use": TEMPLATE}])
@pytest.mark.parametrize("layout", [{"messages": MESSAGES}, {"conversations": SHAREGPT}])
def test_a_missing_chat_template_is_no_fault_of_a_line(tokenizer, tmp_path, read, chat_template, layout):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=chat_template)
    skipped: list[str] = []
    with pytest.raises(ValueError, match=r"no default chat template.*chat_template\.jinja.*'text'"):
        read(write(tmp_path / "a.jsonl", layout), bare, skipped)
    assert skipped == []
    assert len(read_rows(write(tmp_path / "b.jsonl", {"text": "ab"}), bare, 100)) == 1


def test_fields_that_are_none_are_as_good_as_absent(tokenizer, tmp_path):
    """Data sets fill the fields that only other rows have."""
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template="{% for m in messages %}{% if 'tool_calls' in m %}!{% endif %}{% endfor %}" + TEMPLATE,
    )
    filled = [message | {"tool_calls": None} for message in MESSAGES]
    plain, same = read_rows(write(tmp_path / "a.jsonl", {"messages": MESSAGES}, {"messages": filled}), strict, 100)
    assert spelled(plain) == spelled(same)


def test_the_chat_template_reads_its_variables(tokenizer, tmp_path):
    style = "{% if style is not defined %}{{ raise_exception('no style') }}{% endif %}({{ style }})"
    styled = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=style + TEMPLATE)
    path, kwargs = write(tmp_path / "a.jsonl", {"messages": MESSAGES}), {"style": "new"}
    (row,) = read_rows(path, styled, 100, chat_template_kwargs=kwargs)
    assert spelled(row) == ("(new)<user>hi<assistant>yes|<user>so<assistant>no|", "yes|no|")
    for lines in ({"messages": MESSAGES[:1]}, {"turns": ["hi", "so"]}):
        (question,) = read_questions([Line("row 1", lines)], styled, chat_template_kwargs=kwargs)
        assert "".join(map(chr, question.first)) == "(new)<user>hi<assistant>"
    later = turn_prompt(question, [[ord("n")]], styled, kwargs)
    assert later is not None
    assert "".join(map(chr, later)) == "(new)<user>hi<assistant>n|<user>so<assistant>"
    with pytest.raises(ValueError, match=r"line 1: the tokenizer's chat template refuses the messages \(no style\)"):
        read_rows(path, styled, 100)


def test_a_later_turn_that_the_template_refuses_is_named(tokenizer):
    alone = "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}" + TEMPLATE
    strict = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=alone)
    (question,) = read_questions([Line("row 1", {"turns": ["hi", "so"], "question_id": 7})], strict)
    with pytest.raises(ValueError, match=r"question 7, turn 2: .*\(one message\)"):
        turn_prompt(question, [[ord("n")]], strict)


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
    assert with_anchors([row, row], min_labels=4) == []
    assert len(with_anchors([row, row], min_labels=2)) == 2


def counting_rows(*lengths: int) -> list[TrainingRow]:
    return [TrainingRow(torch.arange(10, 10 + n), torch.ones(n, dtype=torch.bool)) for n in lengths]


def test_batches_carry_the_tokens_that_follow_each_anchor():
    dataset = AnchorDataset(counting_rows(12, 5), label_length=3, anchors_per_row=4)
    batch = collate_anchors([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["valid"].sum(1).tolist() == [4, 1]
    for row, column in batch["valid"].nonzero().tolist():
        anchor = int(batch["anchors"][row, column])
        assert batch["labels"][row, column].tolist() == [10 + anchor + offset for offset in (1, 2, 3)]
    assert len(set(batch["anchors"][0].tolist())) == 4


def test_labels_that_are_not_trained_are_missing_and_so_are_those_after_them():
    row = TrainingRow(torch.arange(10, 18), torch.tensor([0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool))
    labels = row.labels(torch.tensor([1, 2, 5, 6]), 3)
    assert labels.tolist() == [[12, 13, MISSING], [13, MISSING, MISSING], [16, 17, MISSING], [17, MISSING, MISSING]]
    dataset = AnchorDataset([row], label_length=3, anchors_per_row=9, min_labels=1)
    assert sorted(dataset[0].anchors.tolist()) == [1, 2, 5, 6]


def test_each_epoch_draws_other_anchors_and_the_same_epoch_the_same():
    def drawn(epoch: int, seed: int = 0) -> list[list[int]]:
        dataset = AnchorDataset(counting_rows(60, 60), label_length=3, anchors_per_row=8, seed=seed)
        dataset.epoch = epoch
        return [dataset[index].anchors.tolist() for index in range(2)]

    assert drawn(0) == drawn(0)
    assert drawn(0)[0] != drawn(0)[1]
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=1)


def test_rows_of_a_batch_are_alike_and_each_row_comes_once_an_epoch():
    lengths = torch.randperm(50, generator=torch.Generator().manual_seed(3)).add(5).tolist()
    dataset = AnchorDataset(counting_rows(*lengths), label_length=3, anchors_per_row=8)
    rows = SimilarRows(dataset, batch_size=4)
    orders = []
    for dataset.epoch in (0, 0, 1):
        orders.append(list(rows))
        assert sorted(orders[-1]) == list(range(50))
        batches = [[lengths[row] for row in orders[-1][at : at + 4]] for at in range(0, 48, 4)]
        assert all(max(batch) - min(batch) < 6 for batch in batches)
        longest = [max(batch) for batch in batches]
        assert longest not in (sorted(longest), sorted(longest)[::-1])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("num_replayed", "share", "per_epoch"), [(30, 0.25, 4), (30, 0.5, 12), (2, 0.5, 12), (0, 0.0, 0)]
)
def test_an_epoch_has_every_new_row_and_a_share_of_those_that_are_replayed(num_replayed, share, per_epoch):
    new = counting_rows(*range(5, 17))
    replayed = [dataclasses.replace(row, is_replay=True) for row in counting_rows(*range(20, 20 + num_replayed))]
    dataset = AnchorDataset(new + replayed, label_length=3, anchors_per_row=8, replay_share=share)
    rows = SimilarRows(dataset, batch_size=4)
    epochs = []
    for dataset.epoch in (0, 0, 1):
        drawn = list(rows)
        assert len(drawn) == len(rows) == 12 + per_epoch
        assert sorted(row for row in drawn if row < 12) == list(range(12))
        epochs.append(sorted(row for row in drawn if row >= 12))
    assert epochs[0] == epochs[1]
    if num_replayed > per_epoch:
        assert len(set(epochs[0])) == per_epoch and epochs[0] != epochs[2]
    elif num_replayed:
        assert epochs[0] == sorted([12, 13] * 6)


def test_rare_tokens_that_are_preferred_go_before_others():
    rows = counting_rows(5, 3)
    assert set(most_frequent(rows, 40, 3).tolist()) == {10, 11, 12}
    assert most_frequent(rows, 40, 4, torch.tensor([30, 14])).tolist()[3] == 14
    assert set(most_frequent(rows, 40, 7, torch.tensor([30, 14, 20])).tolist()) == {10, 11, 12, 13, 14, 20, 30}


def test_cached_hidden_states_reach_the_batch():
    hidden = [torch.randn(12, 4), torch.randn(7, 4)]
    dataset = AnchorDataset(counting_rows(12, 7), label_length=3, anchors_per_row=4, hidden=hidden.__getitem__)
    batch = collate_anchors([dataset[0], dataset[1]])
    assert torch.equal(batch["hidden"][0], hidden[0])
    assert torch.equal(batch["hidden"][1, :7], hidden[1])


def test_a_look_at_the_first_lines_reads_no_more(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "hello"}) + "\n{broken\n")
    assert len(read_rows(path, tokenizer, 100, max_lines=1)) == 1
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path, tokenizer, 100)
