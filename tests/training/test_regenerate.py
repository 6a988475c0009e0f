"""Rows survive a kill at any byte: none is lost, none is doubled."""

import dataclasses
import json

import pytest

from tests.word_tokenizer import word_tokenizer, words_of
from vllm_ctc_spec.training import regenerate as module
from vllm_ctc_spec.training.prompts import read_questions
from vllm_ctc_spec.training.regenerate import (
    RegenerateSettings,
    _temperature,
    all_turns,
    append_rows,
    around_user_turn,
    regenerate,
    resume_rows,
)
from vllm_ctc_spec.training.sources import Line

PROMPTS = [[1, 2], [3], [4, 5, 6]]
ROWS = [{"prompt_token_ids": prompt, "token_ids": [9, i]} for i, prompt in enumerate(PROMPTS)]


def test_a_new_file_starts_at_the_first_prompt(tmp_path):
    assert resume_rows(tmp_path / "rows.jsonl", PROMPTS, 3) == 0


def test_every_cut_resumes_to_the_same_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS)
    whole = path.read_bytes()
    for num_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:num_bytes])
        done = resume_rows(path, PROMPTS, 3)
        assert done == whole[:num_bytes].count(b"\n")
        append_rows(path, ROWS[done:])
        assert path.read_bytes() == whole
    assert [json.loads(line) for line in whole.splitlines()] == ROWS


def test_rows_of_other_prompts_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS)
    with pytest.raises(ValueError, match="line 2 continues another prompt"):
        resume_rows(path, [[1, 2], [8], [4, 5, 6]], 3)
    with pytest.raises(ValueError, match="line 3 continues another prompt"):
        resume_rows(path, PROMPTS[:2], 2)


@pytest.mark.parametrize("num_prompts", [4, 5, 6])
def test_the_continuations_of_a_prompt_take_every_temperature(num_prompts):
    settings = RegenerateSettings(temperatures=(0.0, 0.3, 0.5), samples=3)
    taken = [_temperature(row, num_prompts, settings) for row in range(3 * num_prompts)]
    assert all(sorted(taken[prompt::num_prompts]) == [0.0, 0.3, 0.5] for prompt in range(num_prompts))


def test_a_run_with_other_settings_is_refused_before_an_engine_starts(tmp_path):
    path, settings = tmp_path / "rows.jsonl", RegenerateSettings(temperatures=(0.0, 0.5))
    append_rows(path, ROWS)
    regenerate("target", PROMPTS, path, settings)
    regenerate("target", PROMPTS, path, settings)
    changed = {"temperatures": (0.5,), "max_tokens": 7, "seed": 1, "chat_template_kwargs": {"style": "new"}}
    for name, value in changed.items():
        with pytest.raises(ValueError, match=rf"rows\.jsonl' holds an unfinished run with {name}=.* delete the file"):
            regenerate("target", PROMPTS, path, dataclasses.replace(settings, **{name: value}))
    with pytest.raises(ValueError, match="target='target'; this one has 'other'"):
        regenerate("other", PROMPTS, path, settings)
    # A file without rows may be used by another run.
    path.unlink()
    regenerate("other", [], path, settings)


def test_the_settings_beside_the_rows_have_the_variables_of_the_chat_template(tmp_path):
    path, settings = tmp_path / "rows.jsonl", RegenerateSettings(chat_template_kwargs={"style": "new"})
    append_rows(path, ROWS)
    regenerate("target", PROMPTS, path, settings)
    recorded = json.loads((tmp_path / "rows.jsonl.settings.json").read_text())
    assert recorded["chat_template_kwargs"] == {"style": "new"}


def test_own_prompts_stand_where_the_template_puts_a_user_turn(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ start }} : {% for m in messages %}{{ m.content }} \n{% endfor %}{{ end }}\nassistant"
    tokenizer.save_pretrained(tmp_path)
    around = around_user_turn(str(tmp_path), {"start": "one", "end": "two"})
    assert words_of(tokenizer, around.before) == "one :"
    assert around.after == ["two"]
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--own-prompts: .*\(no user\).* Give the target prompts"):
        around_user_turn(str(tmp_path))


@pytest.mark.parametrize("line", ['{"prompt_token_ids": [3], "token_', "[3]", '{"prompt_token_ids": [3]}', "\0\0\0"])
def test_a_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    append_rows(path, ROWS[:1])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: .*is no row of this command"):
        regenerate("target", PROMPTS, path)


def test_later_turns_follow_the_targets_own_answers(tmp_path, monkeypatch):
    tokenizer = word_tokenizer()
    fields = [{"turns": ["one", "two", "three"]}, {"question": "four"}, {"turns": ["five", "six"]}]
    questions = read_questions((Line(f"row {i}", row) for i, row in enumerate(fields)), tokenizer)
    answer = tokenizer("b")["input_ids"]

    def answered(target, prompts, output, settings, **options):
        assert (settings.temperatures, settings.samples) == ((0.3,), 1)
        append_rows(output, [{"prompt_token_ids": prompt, "token_ids": answer} for prompt in prompts])

    monkeypatch.setattr(module, "regenerate", answered)
    settings = RegenerateSettings(temperatures=(0.3, 1.0), samples=4)
    prompts = all_turns("target", questions, tokenizer, tmp_path / "rows.jsonl", settings, max_model_len=12)
    assert [words_of(tokenizer, prompt) for prompt in prompts] == [
        *(f"user : {word} assistant :" for word in ("one", "four", "five")),
        "user : one assistant : b user : two assistant :",
        "user : five assistant : b user : six assistant :",
    ]
    prompts = all_turns("target", questions, tokenizer, tmp_path / "all.jsonl", settings, max_model_len=100)
    assert words_of(tokenizer, prompts[-1]).endswith("user : two assistant : b user : three assistant :")
    assert len(prompts) == 6
    # The answers to last turns are not generated, because no turn follows them.
    assert len((tmp_path / "all.turn2.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "all.turn3.jsonl").exists()
