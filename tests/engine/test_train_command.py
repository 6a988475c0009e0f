"""`vllm-ctc-spec train` as a process with the real engine, killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

from tests.engine.conftest import complete, engine
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.cli import main
from vllm_ctc_spec.training.regenerate import write_own_prompts
from vllm_ctc_spec.training.stages import held_out_prompts

ENGINE = ["--engine", "dtype=float32", "enforce_eager=true", "max_model_len=256", "kv_cache_memory_bytes=134217728"]


def write_prompts(folder: Path, pair: TinyPair, count: int) -> Path:
    texts = [json.loads(line)["prompt"] for line in pair.prompts.open(encoding="utf-8")]
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"# {i}\n{texts[i % len(texts)][:20]}"}) + "\n" for i in range(count)]
    path.write_text("".join(lines))
    return path


def test_held_out_prompts_are_distinct_and_few():
    prompts = [[i // 2] for i in range(200)]
    held_out = held_out_prompts(prompts)
    assert len(held_out) == len(set(map(tuple, held_out))) == 5
    with pytest.raises(ValueError, match="at least two different prompts"):
        held_out_prompts([[1], [1]])


@pytest.mark.slow
def test_all_stages_make_a_drafter_that_serves(pair: TinyPair, tmp_path: Path):
    prompts, output = write_prompts(tmp_path, pair, 80), tmp_path / "out"
    options = ["--max-tokens=40", "--temperatures", "0", "0.5", "--steps=30", "--frames=4", "--rank=16", *ENGINE]
    command = ["train", "all", str(pair.target), str(prompts), str(output), *options]
    subprocess.run([sys.executable, "-m", "vllm_ctc_spec.cli", *command], check=True, timeout=900)
    rows = [json.loads(line) for line in (output / "rows.jsonl").open()]
    unseen = [json.loads(line) for line in (output / "heldout.jsonl").open()]
    assert (len(rows), len(unseen)) == (2 * 76, 4)
    assert not any(row["prompt_token_ids"] == held["prompt_token_ids"] for row in rows for held in unseen)
    assert json.loads((output / "evaluation.json").read_text())["held-out"]["num_anchors"] > 0
    card = (output / "drafter" / "README.md").read_text()
    assert "80 prompts of prompts.jsonl, at temperatures 0, 0.5" in card and str(tmp_path) not in card
    assert (output / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    question, greedy = [rows[0]["prompt_token_ids"]], SamplingParams(temperature=0, max_tokens=40)
    with engine(pair, {"model": str(output / "drafter")}) as trees:
        assert complete(trees, question, greedy)[0].tokens == rows[0]["token_ids"]
    # A second run only evaluates.
    assert main(command) == 0


@pytest.mark.slow
def test_regeneration_that_is_killed_loses_and_doubles_no_line(pair: TinyPair, tmp_path: Path):
    prompts, rows = write_prompts(tmp_path, pair, 1100), tmp_path / "rows.jsonl"
    command = ["train", "regenerate", str(pair.target), str(prompts), str(rows), "--max-tokens=4", *ENGINE]
    process = subprocess.Popen([sys.executable, "-m", "vllm_ctc_spec.cli", *command], start_new_session=True)
    deadline = time.monotonic() + 900
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = rows.read_bytes()
    assert 0 < kept.count(b"\n") < 1100
    subprocess.run([sys.executable, "-m", "vllm_ctc_spec.cli", *command], check=True, timeout=900)
    assert rows.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert len(rows.read_text().splitlines()) == 1100


@pytest.mark.slow
def test_the_target_writes_prompts_of_its_own(pair: TinyPair, tmp_path: Path):
    target, rows = tmp_path / "target", tmp_path / "rows.jsonl"
    shutil.copytree(pair.target, target)
    # The tiny target writes Python, so that a prompt is the name of a function.
    (target / "chat_template.jinja").write_text("{% for m in messages %}def {{ m['content'] }}({% endfor %}")
    command = ["train", "regenerate", str(target), str(rows), "--own-prompts=40", "--max-tokens=4", *ENGINE]
    assert main(command) == 0
    own = rows.with_name("rows.own-prompts.jsonl")
    written = own.read_text().splitlines(keepends=True)
    names = [json.loads(line)["messages"][0]["content"] for line in written]
    assert len(names) == 40 and not any("(" in name for name in names)
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = [json.loads(line)["prompt_token_ids"] for line in rows.open()]
    assert [tokenizer.decode(prompt) for prompt in prompts] == [f"def {name}(" for name in names]
    own.write_text("".join(written[:30]) + written[30][:20])
    write_own_prompts(str(target), 40, own, enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=1 << 27)
    resumed = own.read_text().splitlines(keepends=True)
    assert len(resumed) == 40 and resumed[:30] == written[:30]


def test_prompts_or_a_chat_template_are_required(pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = shutil.copytree(pair.target, tmp_path / "target")
    (target / "chat_template.jinja").unlink()
    command = ["train", "all", str(target), str(tmp_path / "out")]
    assert main(command) == 2
    assert "--own-prompts" in capsys.readouterr().err
    assert main([*command, "--own-prompts=10", "--dry-run"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_dry_run_needs_no_rows_yet(pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = write_prompts(tmp_path, pair, 8)
    assert main(["train", "all", str(pair.target), str(prompts), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "drafter.dry-run" in capsys.readouterr().out
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_faulty_lines_are_named_or_counted(pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "import os"}\n{broken\n{"prompt": "def f"}\n')
    command = ["train", "all", str(pair.target), str(prompts), str(tmp_path / "out"), "--dry-run"]
    assert main(command) == 2
    assert "prompts.jsonl, line 2: is not JSON" in capsys.readouterr().err
    assert main([*command, "--skip-bad-lines"]) == 0
    assert "1 faulty lines left out" in capsys.readouterr().out


def test_the_seed_is_an_option_of_the_command_and_not_of_the_engine(
    pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts, rows = write_prompts(tmp_path, pair, 1), tmp_path / "rows.jsonl"
    assert main(["train", "regenerate", str(pair.target), str(prompts), str(rows), "--engine", "seed=3"]) == 2
    assert "--engine seed=3: use --seed 3" in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_is_named_before_the_engine_starts(
    pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [5]}\n' + json.dumps({"prompt_token_ids": [5] * 300}) + "\n")
    command = ["train", "regenerate", str(pair.target), str(prompts), str(tmp_path / "rows.jsonl"), *ENGINE]
    assert main(command) == 2
    assert "prompt 2 has 300 tokens, and the target's context holds 256" in capsys.readouterr().err
