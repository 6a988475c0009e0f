"""`vllm-ctc-spec bench` as a process with real engines, killed and started again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.tiny_pair import TinyPair

CONFIG = """
folder: {folder}
target: target
# Compiling would take longer than generating.
engine: {{dtype: float32, max_model_len: 256, kv_cache_memory_bytes: 67108864, enforce_eager: true}}
methods:
  plain: null
  broken: {{method: draft_model, model: drafter, num_speculative_tokens: 3}}
  ngram: {{method: ngram, num_speculative_tokens: 5, prompt_lookup_max: 4, prompt_lookup_min: 1}}
prompts: {{code: {{source: corpus/heldout.jsonl, last: 6}}}}
batch_sizes: [1, 4]
num_prompts: 2
max_tokens: 24
rounds: 2
"""


@pytest.mark.slow
def test_a_killed_run_resumes_and_a_broken_method_does_not_stop_it(pair: TinyPair, tmp_path: Path):
    config, output = tmp_path / "bench.yaml", tmp_path / "out"
    config.write_text(CONFIG.format(folder=pair.target.parent))
    command = [sys.executable, "-m", "vllm_ctc_spec.cli", "bench", str(config), str(output)]
    first, second = (output / "cells" / f"code-batch{size}-temperature0.json" for size in (1, 4))

    process = subprocess.Popen(command)
    deadline = time.monotonic() + 900
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    engines = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert engines and not psutil.wait_procs(engines, timeout=60)[1]
    measured = first.read_bytes()
    assert not (output / "report.md").exists()

    subprocess.run(command, check=True, timeout=900)
    assert first.read_bytes() == measured
    results = json.loads((output / "results.json").read_text())
    assert [len(cell["prompt_names"]) for cell in results["cells"]] == [2, 4]
    assert results["cells"][1] == json.loads(second.read_text())
    for cell in results["cells"]:
        assert set(cell["methods"]) == {"plain", "ngram"}
        assert "broken" in cell["errors"]
        plain, ngram = cell["methods"]["plain"], cell["methods"]["ngram"]
        assert plain["overall"]["beta"] == 1.0
        # n-grams draft rarely, and every accepted token is one step less.
        assert 1.0 <= ngram["overall"]["beta"] <= ngram["acceptance_length"] <= 6.0
        assert len(ngram["tokens_per_second"]) == 2
        assert ngram["peak_memory"] > 100 << 20
        assert plain["equality"]["exact"] and ngram["equality"]["exact"], (plain["equality"], ngram["equality"])
    report = (output / "report.md").read_text()
    assert "* broken: " in report and "| ngram |" in report
    assert (output / "ratio.png").exists()
