"""An engine that cannot compute the hidden states is refused with one error, before the training begins."""

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.training.tiny_models import tiny_target
from vllm_ctc_spec.cli import main
from vllm_ctc_spec.training.hidden_sources import FromEngine, numbers_of


@pytest.fixture(scope="module")
def target_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_target().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-from-engine"], "Name a folder for them with --cache"),
        (["--cache=cache", "--hidden-from-engine", "quantisation=gptq"], "Did you mean 'quantization'?"),
        (["--cache=cache", "--hidden-from-engine", "enforce_eager=false"], "enforce_eager=False: the command sets it"),
        (["--cache=cache", "--hidden-from-engine", "trust_remote_code=true"], "Use --trust-remote-code"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_options_that_are_no_use_are_refused_by_name(target_path, tmp_path, capsys, arguments, message, dry):
    command = ["train", "fit", target_path, str(tmp_path / "rows.jsonl"), str(tmp_path / "drafter")]
    assert main([*command, *dry, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "--hidden-from-engine" in error
    assert not list(tmp_path.iterdir())


def test_layers_that_vllm_does_not_hand_out_are_refused(tmp_path, capsys):
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "target")
    command = [
        "train",
        "fit",
        str(tmp_path / "target"),
        "rows.jsonl",
        str(tmp_path / "drafter"),
        "--target-layers",
        "1",
    ]
    assert main([*command, f"--cache={tmp_path / 'cache'}", "--hidden-from-engine"]) == 2
    assert "GPT2LMHeadModel does not hand out the hidden states of layers [1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "longest", "message"),
    [
        ({}, 129, r"longest row has 129 tokens, and max_model_len=128 .*Lower --max-length"),
        ({"max_model_len": 16}, 17, "longest row has 17 tokens, and max_model_len=16"),
        ({"quantization": "awq"}, 8, r"vLLM's engine did not start \(ValidationError: .*awq.*Change its options"),
    ],
)
def test_an_engine_that_does_not_start_is_one_error(target_path, options, longest, message):
    source = FromEngine(tiny_target(), target_path, {"kv_cache_memory_bytes": 1 << 27, **options})
    with pytest.raises(ValueError, match=message), source.started([3, longest], (), print):
        pass


def test_a_resumed_run_may_have_other_devices_and_memory_but_no_other_numbers():
    before = {"quantization": "gptq", "dtype": "float16", "tensor_parallel_size": 2, "max_num_seqs": 8}
    assert numbers_of(before) == numbers_of({"dtype": "float16", "quantization": "gptq", "max_model_len": 64})
    assert numbers_of(before) != numbers_of({"dtype": "float16"})
    assert json.loads(json.dumps(numbers_of(before))) == {"dtype": "float16", "quantization": "gptq"}
