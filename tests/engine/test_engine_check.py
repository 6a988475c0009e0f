"""benchmarks/gpu/engine_check.py, run on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.engine_check import CASES, judge
from tests.tiny_pair import TinyPair

ROOT = Path(__file__).parents[2]
FLOAT32, BFLOAT16 = (next(case for case in CASES if case.dtype == dtype) for dtype in ("float32", "bfloat16"))


def check(results: Path, pair: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.engine_check", str(results), "--pair", str(pair), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_both_engines_give_equal_answers_and_branches_are_accepted(pair: TinyPair, tmp_path: Path) -> None:
    limits = "--seconds", "600", "--engine-seconds", "600"
    done = check(tmp_path, pair.target.parent, "--max-tokens", "24", "--at-once", "2", *limits)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "engine_check.json").read_text())["rows"]
    assert [(row["sampling"], row["partings"], row["repeats"]) for row in rows] == [
        ("greedy", [], True),
        ("seeded", [], True),
    ]
    assert rows[0]["acceptance_length"] > 1.5


def test_an_engine_that_fails_keeps_its_traceback(pair: TinyPair, tmp_path: Path) -> None:
    """The drafter's folder is empty."""
    for name, there in (("target", pair.target), ("corpus", pair.prompts.parent)):
        (tmp_path / name).symlink_to(there)
    (tmp_path / "drafter").mkdir()
    done = check(tmp_path / "results", tmp_path, "--max-tokens", "4", "--seconds", "600", "--engine-seconds", "600")
    [row] = json.loads((tmp_path / "results" / "engine_check.json").read_text())["rows"]
    assert done.returncode == 1
    assert "ctc: exit status 1" in row["error"]
    assert "Traceback" in (tmp_path / "results" / "float32-eager-V1-ctc.log").read_text()


def answers(tokens: list[int], acceptance_length: float | None = 2.0) -> dict[str, Any]:
    sampled = {"tokens": [tokens], "repeats": True, "ms_per_step": 1.0}
    return {
        "greedy": sampled,
        "seeded": sampled,
        "gaps": [[3.0, 0.1, 3.0]],
        "acceptance_length": acceptance_length,
        "facts": {"graphs_captured": 0},
    }


def test_a_difference_is_reported_with_its_gap_and_fails_in_float32() -> None:
    plain, ours = answers([1, 2, 3]), answers([1, 4, 3])
    greedy, seeded = judge(FLOAT32, plain, ours)
    assert greedy["partings"] == [{"prompt": 0, "position": 1, "gap": 0.1}]
    assert not greedy["ok"] and not seeded["ok"]
    assert all(row["ok"] for row in judge(BFLOAT16, plain, ours))


def test_a_difference_far_from_a_tie_fails_in_bfloat16() -> None:
    greedy, _ = judge(BFLOAT16, answers([1, 2, 3]), answers([4, 2, 3]))
    assert not greedy["ok"]


@pytest.mark.parametrize("acceptance_length", [None, 1.0])
def test_equal_tokens_without_accepted_drafts_fail(acceptance_length: float | None) -> None:
    rows = judge(FLOAT32, answers([1, 2, 3]), answers([1, 2, 3], acceptance_length))
    assert not any(row["ok"] for row in rows)
