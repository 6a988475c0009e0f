"""A target whose folder brings its own model code is read where the user trusts it, and else refused."""

import json
from pathlib import Path

import pytest

from tests.training.tiny_models import tiny_drafter, tiny_target
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


TOO_LONG = 10**9
"""Tokens of context, for which no memory suffices. A command says so when it has read the target."""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder, model = tmp_path / "target", tiny_target(tied=False)
    model.save_pretrained(folder)
    tiny_drafter(model).save_pretrained(folder / "ctc-drafter")
    word_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | FIELDS
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def test_every_stage_of_training_runs_it_only_with_the_option(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
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


def test_inspect_runs_it_only_with_the_option(target: Path, capsys: pytest.CaptureFixture[str]):
    command = ["inspect", str(target), str(target / "ctc-drafter"), "--prompt", "one two", "--nodes=3"]
    assert main(command) == 2
    assert "add --trust-remote-code" in capsys.readouterr().err
    assert main([*command, TRUST]) == 0
    assert "3 nodes, expected tokens this step" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "chat", "bench"])
def test_commands_with_engines_run_it_only_with_the_option(
    target: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "words.jsonl").write_text('{"prompt": "one two"}\n')
    (tmp_path / "bench.yaml").write_text("{target: target, methods: {plain: null}, prompts: {words: words.jsonl}}")
    engine = ["--engine", f"max_model_len={TOO_LONG}"]
    prompts = ["--prompts", str(tmp_path / "words.jsonl"), "--num-prompts=1"]
    arguments = {
        "verify": [str(target), "--speculative-config", '{"method": "ctc"}', *prompts, *engine],
        "chat": [str(target), str(target / "ctc-drafter"), *engine],
        "bench": [
            str(tmp_path / "bench.yaml"),
            str(tmp_path / "out"),
            "--set",
            f"engine={{max_model_len: {TOO_LONG}}}",
        ],
    }[command]
    assert main([command, *arguments]) == 2
    assert "add --trust-remote-code" in capsys.readouterr().err
    assert main([command, *arguments, TRUST]) == 2
    assert f"max_model_len={TOO_LONG} tokens need" in capsys.readouterr().err
