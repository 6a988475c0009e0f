"""`make gpu-check`, as far as it can be tested without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.kernel_check import design_verdict

ROOT = Path(__file__).parents[1]
CHECK = ROOT / "benchmarks" / "gpu" / "check.sh"


def check(folder: Path, python: str, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, **changed}
    return subprocess.run([CHECK, folder], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = check(tmp_path / "results", sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch sees no CUDA device" in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_stage_that_fails_keeps_its_traceback_and_the_next_ones_run(tmp_path: Path) -> None:
    """A program in place of Python that prints its arguments, and fails for one of the stages."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\n[[ $1 == -c ]] && exit 0\necho "asked for $*"\n'
        '[[ $2 == benchmarks.gpu.kernel_check ]] && { echo "Traceback of it" >&2; exit 1; }\nexit 0\n'
    )
    python.chmod(0o755)
    done = check(tmp_path / "results", str(python))
    assert done.returncode == 1
    lines = (tmp_path / "results" / "summary.txt").read_text().splitlines()
    passed = ("tests", "step_cost", "engine_check")
    assert sorted(lines) == sorted(["kernel_check: exit status 1", *(f"{name}: exit status 0" for name in passed)])
    assert "Traceback of it" in (tmp_path / "results" / "kernel_check.log").read_text()
    assert "asked for -m benchmarks.gpu.step_cost --json" in (tmp_path / "results" / "step_cost.log").read_text()


def test_stages_can_be_chosen(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nexit 0\n")
    python.chmod(0o755)
    assert check(tmp_path / "results", str(python), STAGES="engine_check").returncode == 0
    assert (tmp_path / "results" / "summary.txt").read_text() == "engine_check: exit status 0\n"


def test_the_verdict_names_the_shapes_in_which_two_passes_are_faster() -> None:
    shape = {"batch": 1, "context": 1024}
    rows = [
        {**shape, "nodes": 8, "ours": 1.0, "flash+tail": 2.0, "cudnn+tail": 1.5},
        {**shape, "nodes": 31, "ours": 3.0, "flash+tail": 2.0, "cudnn+tail": 1.5},
        {**shape, "nodes": 63, "ours": 3.0, "flash+tail": None, "cudnn+tail": None},
    ]
    assert design_verdict(rows).splitlines() == [
        "one kernel is faster in 1 of 2 shapes; two passes in:",
        "  batch 1, context 1024, nodes 31: cudnn+tail, 2.00 x",
    ]


def test_nothing_of_it_needs_vllm() -> None:
    """It is imported and its tests are collected where vLLM cannot be."""
    program = f"""
import json, sys
sys.modules["vllm"] = None
import benchmarks.gpu.kernel_check, benchmarks.gpu.step_cost
import pytest

class Count:
    def pytest_collection_finish(self, session):
        print(json.dumps(sorted({{item.path.name for item in session.items}})))

paths = {["tests/ops", "tests/algorithm", "tests/training/test_evaluate.py"]}
sys.exit(pytest.main(["--collect-only", "-q", "--no-header", "-m", "gpu", "-p", "no:cacheprovider", *paths], [Count()]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [names] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert names == ["test_device_work.py", "test_evaluate.py", "test_gpu.py", "test_two_pass.py"]
