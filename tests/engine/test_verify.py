"""`vllm-ctc-spec verify` as its users run it, over real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_pair import TinyPair
from vllm_ctc_spec.cli import main


@pytest.mark.slow
def test_our_method_changes_no_answer_in_float32(pair: TinyPair, tmp_path: Path) -> None:
    ours = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": 12, "adaptive_budget": False}
    report = tmp_path / "verify.json"
    arguments = ["verify", str(pair.target), "--speculative-config", json.dumps(ours), "--json", str(report)]
    arguments += ["--prompts", str(pair.prompts), "--num-prompts", "6", "--max-tokens", "24"]
    arguments += ["--engine", "enforce_eager=true"]
    assert main(arguments) == 0
    found = json.loads(report.read_text())
    assert found["facts"]["method"] == "ctc" and found["acceptance_length"] > 1
    groups = {group["name"]: group for group in found["groups"]}
    assert all(group["equal"] == group["num_requests"] > 0 for group in groups.values())
    assert groups["log probabilities"]["largest_logprob_difference"] < 1e-4
