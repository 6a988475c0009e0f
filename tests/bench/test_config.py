from __future__ import annotations

from pathlib import Path

import pytest

from vllm_ctc_spec.bench.config import BenchConfig, load_config
from vllm_ctc_spec.bench.records import Sampling
from vllm_ctc_spec.cli import main
from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter

DRAFTER = {
    "hidden_size": 8,
    "vocab_size": 11,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 8,
}
CONFIGURATIONS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.yaml"))

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
    assert (config.rounds, config.batch_sizes, config.sampling) == (10, (1,), (Sampling(),))
    assert [method.name for method in config.methods] == ["plain", "ngram"]


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("batch_size: [1]", "unknown key 'batch_size' .* Did you mean 'batch_sizes'"),
        ("batch_sizes: [1, 0]", "batch_sizes: 0"),
        ("batch_sizes: [4, 4]", "each value once"),
        ("batch_sizes: []", "at least one"),
        ("sampling: []", r"sampling=\[\]: give a list"),
        ("sampling: {temperature: 0}", "give a list"),
        ("sampling: [0.2]", r"sampling\[0\]=0.2: give a mapping with 'temperature'"),
        ("sampling: [{temperature: 0}, {top_p: 0.9}]", r"sampling\[1\]=.* with 'temperature'"),
        ("sampling: [{temperature: 1, topp: 0.9}]", r"unknown key 'topp' in sampling\[0\].* Did you mean 'top_p'"),
        ("sampling: [{temperature: -1}]", r"sampling\[0\].temperature=-1 must be at least 0"),
        ("sampling: [{temperature: warm}]", r"sampling\[0\].temperature='warm' must be a number"),
        ("sampling: [{temperature: 1, top_p: 0}]", r"sampling\[0\].top_p=0 must be above 0"),
        ("sampling: [{temperature: 0}, {temperature: 0.0, top_p: 1}]", "each value once"),
        ("rounds: 1", "rounds=1: use an integer of at least 2"),
        ("max_tokens: true", "max_tokens=True"),
        ("ignore_eos: 1", "ignore_eos=1"),
        ("engine: {max_num_seqs: 8}", "engine.max_num_seqs: the benchmark sets it"),
        ("engine: [1]", r"engine must hold options of vllm.LLM, is \[1\]"),
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
        ("{method: ctc}", "methods.other: no CTC drafter on this machine belongs to target"),
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
        ("prompts:\n  questions:", "prompts:", "prompts must map names to settings, is str"),
        ("target: target", "target: target\nfolder: nowhere", "no such folder"),
    ],
)
def test_what_is_wrong_elsewhere_is_named(folder: Path, old: str, new: str, message: str):
    with pytest.raises(ValueError, match=message):
        load(folder, MINIMAL.replace(old, new))


@pytest.mark.parametrize(("text", "message"), [("a: [", "bench.yaml' is not YAML"), ("[1]", "must hold a mapping")])
def test_a_file_of_something_else_is_named(folder: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        load(folder, text)


def test_a_file_that_is_not_there_is_named(folder: Path):
    with pytest.raises(ValueError, match=r"no.yaml' cannot be read \(No such file"):
        load_config(folder / "no.yaml")


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


def test_a_cell_is_sampled_as_its_entry_says(folder: Path):
    config = load(folder, "sampling: [{temperature: 0}, {temperature: 0.2, top_p: 0.9}]" + MINIMAL)
    greedy, sampled = config.sampling
    assert greedy == Sampling(0.0, 1.0) and greedy.is_greedy and str(greedy) == "temperature 0"
    assert sampled == Sampling(0.2, 0.9) and not sampled.is_greedy
    assert (str(sampled), sampled.file_part) == ("temperature 0.2, top-p 0.9", "temperature0.2-top-p0.9")
    assert load(folder, settings=["sampling=[{temperature: 1}]"]).sampling == (Sampling(1.0),)


def test_the_paper_fixes_batch_sampling_and_prompts(folder: Path):
    text = (
        "batch_sizes: [1, 4]\nsampling: [{temperature: 1}]"
        + MINIMAL.replace("questions: ", "mt-bench: ")
        + "  gsm8k: questions.jsonl\n"
    )
    config = load(folder, text, preset="paper")
    assert (config.batch_sizes, config.sampling, config.max_tokens) == ((1,), (Sampling(),), 1024)
    with pytest.raises(ValueError, match="'mt-bench' is missing"):
        load(folder, preset="paper")
    with pytest.raises(ValueError, match=r"--set batch_sizes=\[4\]: --preset paper sets it to \[1\]"):
        load(folder, text, settings=["batch_sizes=[4]"], preset="paper")


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


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_whole(path: Path, folder: Path):
    """Creates the folders and files that the YAMLs expect of their user."""
    CTCDrafter(CTCDrafterConfig(**DRAFTER)).save_pretrained(folder / "drafter")
    for name in ("medusa", "eagle", "eagle3", "draft"):
        (folder / name).mkdir()
    for name in ("mt_bench", "mt_bench_questions", "gsm8k_questions", "rewriting", "page_questions"):
        (folder / f"{name}.jsonl").touch()
    has_both_sets = path.stem in ("paper", "smollm2")
    config = load_config(path, [f"folder={folder}"], preset="paper" if has_both_sets else None)
    assert {"plain", "ctc"} <= {method.name for method in config.methods}
    if has_both_sets:
        assert (config.batch_sizes, config.sampling, config.max_tokens) == ((1,), (Sampling(),), 1024)
