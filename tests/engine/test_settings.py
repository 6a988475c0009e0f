"""Every mistake is one ValueError before a worker starts, naming the setting and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_pair import TinyPair
from vllm_ctc_spec.engine import compat
from vllm_ctc_spec.engine.plugin import EXECUTOR


def configure(pair: TinyPair, spec: dict[str, Any], target: Path | None = None, **options: Any) -> Any:
    spec = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": 8, **spec}
    return EngineArgs(model=str(target or pair.target), speculative_config=spec, **options).create_engine_config()


def edited(source: Path, folder: Path, **fields: Any) -> Path:
    """A copy of a model folder with other values in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_good_configuration_is_accepted_and_the_users_settings_are_left_alone(pair: TinyPair) -> None:
    spec = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": 8, "tree": "chain"}
    arguments = EngineArgs(model=str(pair.target), speculative_config=dict(spec))
    for _ in range(2):
        config = arguments.create_engine_config()
        assert config.parallel_config.worker_cls.endswith("CTCCPUWorker")
        assert config.speculative_config.num_speculative_tokens == 8
        assert config.additional_config["ctc_spec"]["options"]["tree"] == "chain"
    assert arguments.speculative_config == spec


OWN_EXECUTOR = "vllm.v1.executor.multiproc_executor.MultiprocExecutor"


@pytest.mark.parametrize(
    ("asked", "multiprocessing", "expected"),
    [(None, "1", EXECUTOR), ("mp", "1", EXECUTOR), (None, "0", "uni"), (OWN_EXECUTOR, "1", OWN_EXECUTOR)],
)
def test_the_executor_is_ours_where_it_would_be_vllms_own_of_one_process_per_worker(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, asked: str | None, multiprocessing: str, expected: str
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    spec = {"method": "ctc", "model": str(pair.drafter)}
    arguments = EngineArgs(model=str(pair.target), distributed_executor_backend=asked, speculative_config=spec)
    assert arguments.create_engine_config().parallel_config.distributed_executor_backend == expected


def test_shorthands_detect_the_drafter_from_its_config(pair: TinyPair) -> None:
    config = EngineArgs(model=str(pair.target), spec_model=str(pair.drafter), spec_tokens=5).create_engine_config()
    assert config.speculative_config.num_speculative_tokens == 5
    assert config.additional_config["ctc_spec"]["drafter"] == str(pair.drafter)


def test_a_setting_given_twice_is_refused(pair: TinyPair) -> None:
    with pytest.raises(ValueError, match=r"--spec-tokens and .*num_speculative_tokens.* mutually exclusive"):
        configure(pair, {}, spec_tokens=5)


def test_another_method_is_left_to_vllm(pair: TinyPair) -> None:
    spec = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    config = EngineArgs(model=str(pair.target), speculative_config=spec).create_engine_config()
    assert config.speculative_config.method == "ngram"
    assert "ctc_spec" not in config.additional_config


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0.*from 1 to 63"),
        ({"num_speculative_tokens": 64}, "num_speculative_tokens=64.*from 1 to 63"),
        ({"num_speculative_tokens": "many"}, "num_speculative_tokens='many'"),
        ({"tre": "prefix"}, "unknown key 'tre'.*Did you mean 'tree'"),
        ({"prompt_lookup_max": 4}, "unknown key 'prompt_lookup_max'"),
        ({"tree": "bush"}, "tree='bush'.*prefix, template, chain"),
        ({"candidates": 0}, "candidates=0.*1 to 64"),
        ({"adaptive_budget": "yes"}, "adaptive_budget='yes'.*true or false"),
        ({"attention_kernel": "flash"}, "attention_kernel='flash': use one of own, xformers"),
        ({"attention_kernel": "xformers"}, "attention_kernel='xformers'.*CUDA device.*Leave it out"),
        ({"min_prefix_probability": 1.5}, r"min_prefix_probability=1.5.*\[0, 1\)"),
        ({"model": None}, "'model'.*folder of a trained CTC drafter"),
        ({"model": "no/such/folder"}, "'no/such/folder' is not a folder"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_by_name(pair: TinyPair, spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(pair, spec)


def test_a_folder_of_another_model_type_is_refused(pair: TinyPair) -> None:
    with pytest.raises(ValueError, match="model_type 'llama', not 'ctc_drafter'"):
        configure(pair, {"model": str(pair.target)})


def test_truncated_weights_are_refused(pair: TinyPair, tmp_path: Path) -> None:
    folder = edited(pair.drafter, tmp_path / "drafter")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="missing or truncated"):
        configure(pair, {"model": str(folder)})
    weights.unlink()
    with pytest.raises(ValueError, match="missing or truncated"):
        configure(pair, {"model": str(folder)})


def test_weights_that_contradict_the_config_are_refused(pair: TinyPair, tmp_path: Path) -> None:
    folder = edited(pair.drafter, tmp_path / "drafter", num_frames=5, label_length=5)
    with pytest.raises(ValueError, match="'frame_queries' has shape"):
        configure(pair, {"model": str(folder)})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"hidden_size": 256}, "hidden_size"),
        ({"vocab_size": 320}, "vocab_size"),
        ({"num_key_value_heads": 2, "num_attention_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 32}, "head_dim"),
    ],
)
def test_a_drafter_of_another_target_is_refused(pair: TinyPair, tmp_path: Path, fields: dict, name: str) -> None:
    target = edited(pair.target, tmp_path / "target", **fields)
    with pytest.raises(ValueError, match=f"has {name} .* trained for another target"):
        configure(pair, {}, target)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
            "sliding-window attention",
        ),
        (
            {
                "model_type": "gemma2",
                "architectures": ["Gemma2ForCausalLM"],
                "attn_logit_softcapping": 50.0,
                "sliding_window": None,
            },
            "soft-capping|sliding-window",
        ),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "hybrid or state-space"),
    ],
)
def test_an_unsupported_target_is_refused_by_what_it_has(
    pair: TinyPair, tmp_path: Path, fields: dict, message: str
) -> None:
    target = edited(pair.target, tmp_path / "target", **fields)
    with pytest.raises(ValueError, match=message):
        configure(pair, {}, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"block_size": 16}, "block_size=16.*multiple of 32"),
        ({"worker_cls": "some.Worker"}, "worker-cls 'some.Worker'"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(pair: TinyPair, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(pair, {}, **options)


def test_an_unsupported_vllm_is_refused_only_when_the_method_is_used(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: "0.33.0")
    assert EngineArgs(model=str(pair.target)).create_engine_config().speculative_config is None
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.32\.x, but 0\.33\.0"):
        configure(pair, {})
