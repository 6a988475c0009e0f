from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ctc_spec.bench.config import BenchConfig, load_config
from vllm_ctc_spec.cli import main

MINIMAL = """
target: target
methods:
  plain: null
  ngram: {method: ngram, num_speculative_tokens: 5}
prompts:
  questions: questions.jsonl
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


def load(folder: Path, text: str = MINIMAL, **arguments) -> BenchConfig:
    path = folder / "bench.yaml"
    path.write_text(text)
    return load_config(path, **arguments)


def test_paths_are_relative_to_the_yaml_and_rounds_are_ten(folder: Path):
    config = load(folder)
    assert config.target == str(folder / "target")
    assert config.prompts["questions"].source == str(folder / "questions.jsonl")
    assert (config.rounds, config.batch_sizes, config.temperatures) == (10, (1,), (0.0,))
    assert [method.name for method in config.methods] == ["plain", "ngram"]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("batch_size: [1]", "unknown key 'batch_size' .* Did you mean 'batch_sizes'"),
        ("batch_sizes: [1, 0]", "batch_sizes: 0"),
        ("batch_sizes: [4, 4]", "each value once"),
        ("batch_sizes: []", "at least one"),
        ("temperatures: [-1]", "temperatures: -1"),
        ("temperatures: [warm]", "temperatures: 'warm'"),
        ("rounds: 1", "rounds=1: use an integer of at least 2"),
        ("max_tokens: true", "max_tokens=True"),
        ("ignore_eos: 1", "ignore_eos=1"),
        ("engine: {max_num_seqs: 8}", "engine.max_num_seqs: the benchmark sets it"),
        ("seed: 1\nseed: 2", "line 2: 'seed' is there twice"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, added: str, message: str):
    with pytest.raises(ValueError, match=message):
        load(folder, added + MINIMAL)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{method: ctc, model: nowhere}", "methods.other.model='nowhere': .* does not exist"),
        ("{method: ctc, model: target}", "methods.other: "),
        ("{method: ctc, model: target, candidate: 3}", "unknown key 'candidate'.* Did you mean 'candidates'"),
        ("{method: ctc, model: target, num_speculative_tokens: 64}", "num_speculative_tokens=64"),
        ("{method: ctc}", "no 'model'"),
        ("null", "write it with 'method' or 'model'"),
        ("{engine: {seed: 1}, method: ngram}", "methods.other.engine.seed"),
        ("ngram", "must be null or a speculative_config"),
    ],
)
def test_what_is_wrong_with_a_method_is_named(folder: Path, method: str, message: str):
    with pytest.raises(ValueError, match=message):
        load(folder, MINIMAL.replace("  ngram:", f"  other: {method}\n  ngram:"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("plain: null", "base: {method: ngram}", "methods has no 'plain'"),
        ("plain: null", "plain: {method: ngram}", "write it without speculative_config"),
        ("  ngram:", "  plain:", "'plain' is there twice"),
        ("  ngram:", "  n/gram:", "the name 'n/gram'"),
        ("target: target", "target: no/target.json", "target='no/target.json'"),
        ("target: target\n", "", "has no 'target'"),
        ("questions: questions.jsonl", "questions: {source: questions.jsonl, last: 1, skip: 1}", "'last' goes without"),
        ("questions: questions.jsonl", "questions: {source: questions.jsonl, limit: 0}", "limit=0"),
        ("questions: questions.jsonl", "questions: {from: questions.jsonl}", "with 'source'"),
        ("questions: questions.jsonl", "questions: missing.jsonl", "prompts.questions.source='missing.jsonl'"),
        ("target: target", "target: target\nfolder: nowhere", "no such folder"),
    ],
)
def test_what_is_wrong_elsewhere_is_named(folder: Path, old: str, new: str, message: str):
    with pytest.raises(ValueError, match=message):
        load(folder, MINIMAL.replace(old, new))


def test_a_missing_package_skips_the_method_unchecked(folder: Path):
    text = MINIMAL.replace(
        "  ngram:", "  suffix: {method: suffix, model: nowhere, requires: no_such_package}\n  ngram:"
    )
    suffix = load(folder, text).methods[1]
    assert (suffix.name, suffix.missing) == ("suffix", "no_such_package")


def test_values_are_set_from_the_command_line(folder: Path):
    other = folder / "other"
    (other / "target").mkdir(parents=True)
    (other / "questions.jsonl").touch()
    config = load(folder, settings=["folder=other", "methods.ngram.num_speculative_tokens=3", "batch_sizes=[2, 8]"])
    assert config.target == str(other / "target")
    assert config.methods[1].speculative_config == {"method": "ngram", "num_speculative_tokens": 3}
    assert config.batch_sizes == (2, 8)
    with pytest.raises(ValueError, match="there is no 'medusa'"):
        load(folder, settings=["methods.medusa.model=x"])
    with pytest.raises(ValueError, match="write KEY=VALUE"):
        load(folder, settings=["rounds"])


def test_plain_vllm_may_run_twice(folder: Path):
    config = load(folder, MINIMAL.replace("  ngram:", "  plain-again: null\n  ngram:"))
    plain, again = (config.engine_options(method) for method in config.methods[:2])
    assert config.methods[1].name == "plain-again"
    assert plain == again


def test_only_keeps_plain_and_refuses_a_stranger(folder: Path):
    text = MINIMAL.replace("  ngram:", "  suffix: {method: suffix}\n  ngram:")
    assert [method.name for method in load(folder, text, only=["ngram"]).methods] == ["plain", "ngram"]
    with pytest.raises(ValueError, match="--only eagle: no such method"):
        load(folder, text, only=["eagle"])


def test_the_paper_fixes_batch_temperature_and_prompts(folder: Path):
    text = MINIMAL.replace("questions: ", "mt-bench: ") + "  gsm8k: questions.jsonl\n"
    config = load(folder, text, preset="paper")
    assert (config.batch_sizes, config.temperatures, config.max_tokens) == ((1,), (0,), 1024)
    with pytest.raises(ValueError, match="'mt-bench' is missing"):
        load(folder, preset="paper")
    with pytest.raises(ValueError, match=r"batch_sizes=.*preset 'paper' sets it to"):
        load(folder, "batch_sizes: [4]" + text, preset="paper")


def test_engine_options_of_a_method_win_and_all_are_measured_alike(folder: Path):
    text = MINIMAL.replace("method: ngram,", "method: ngram, engine: {enforce_eager: true, dtype: bfloat16},")
    config = load(folder, "engine: {dtype: float32}\nbatch_sizes: [4, 16]" + text)
    plain, ngram = (config.engine_options(method) for method in config.methods)
    assert (plain["dtype"], ngram["dtype"], ngram["enforce_eager"]) == ("float32", "bfloat16", True)
    assert plain["max_num_seqs"] == ngram["max_num_seqs"] == 16
    assert "speculative_config" not in plain
    assert ngram["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 5}
    assert plain["enable_prefix_caching"] is False


def test_the_command_prints_one_line(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "bench.yaml").write_text("rouds: 3" + MINIMAL)
    assert main(["bench", str(folder / "bench.yaml"), str(folder / "out")]) == 2
    assert "Did you mean 'rounds'" in capsys.readouterr().err
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["trained_pair", "paper"])
def test_the_configurations_of_the_repository_are_whole(name: str, folder: Path):
    """They name folders that only their user has; everything before that check passes."""
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.yaml"
    with pytest.raises(ValueError, match="does not exist"):
        load_config(path, [f"folder={folder}"], preset="paper" if name == "paper" else None)
