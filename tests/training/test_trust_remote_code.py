"""A target whose folder brings its own model code is trained for where the user trusts it, and else refused."""

import json
from pathlib import Path

import pytest

from tests.training.tiny_models import tiny_target
from tests.word_tokenizer import word_tokenizer
from vllm_ctc_spec.cli import main

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
FIELDS = {
    "model_type": "own_llama",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
}
TRUST = "--trust-remote-code"
SMALL = ["--steps=2", "--frames=4", "--rank=8", "--draft-vocab-size=0"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    tiny_target(tied=False).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | FIELDS
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def test_every_stage_runs_it_only_with_the_option(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts, rows, drafter = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl", tmp_path / "drafter"
    prompts.write_text('{"prompt": "one two"}\n')
    row = {"prompt_token_ids": [1], "token_ids": [index % 9 + 2 for index in range(40)]}
    rows.write_text(2 * (json.dumps(row) + "\n"))
    commands = [
        ["train", "all", str(target), str(prompts), str(tmp_path / "out"), "--own-prompts=2", "--dry-run", *SMALL],
        ["train", "fit", str(target), str(rows), str(drafter), *SMALL],
        ["train", "evaluate", str(target), str(drafter), str(rows)],
    ]
    for command in commands:
        assert main(command) == 2
        assert "trust_remote_code" in capsys.readouterr().err
        assert main([*command, TRUST]) == 0
