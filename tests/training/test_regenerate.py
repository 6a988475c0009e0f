"""Rows survive a kill at any byte: none is lost, none is doubled."""

import json

import pytest

from vllm_ctc_spec.training.regenerate import RegenerateSettings, _temperature, append_rows, resume_rows

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
