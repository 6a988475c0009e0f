"""`make drafter` calls `train all` with what the shipped drafter was trained with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_ctc_spec.cli import _parser

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_drafter.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_drafter", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "default_target", lambda: Path("/cache/target"))
    monkeypatch.setattr(module, "main", lambda: 0)
    monkeypatch.setattr(sys, "argv", [])
    return module


@pytest.mark.parametrize("prompts", [[], ["prompts.jsonl"]])
def test_the_users_options_come_last(script: ModuleType, prompts: list[str]):
    assert script.run(["out", *prompts, "--minutes=2", "--dry-run"]) == 0
    options = _parser().parse_args(sys.argv[1:])
    assert (options.target, options.output, options.prompts) == ("/cache/target", Path("out"), (prompts or [None])[0])
    assert (options.minutes, options.dry_run, options.temperatures[:2]) == (2.0, True, [0.0, 0.5])
    assert options.own_prompts > 0 and options.target_name == script.HUB_NAME


def test_without_a_folder_it_says_what_it_needs(script: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert script.run([]) == 2
    assert "OUTPUT [PROMPTS]" in capsys.readouterr().err
