"""vLLM's configuration with our settings."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform

from tests.tiny_pair import TinyPair
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.engine import compat, settings
from vllm_ctc_spec.engine.plugin import EXECUTOR, SCHEDULER, is_ctc
from vllm_ctc_spec.engine.settings import EngineSettings, check_final
from vllm_ctc_spec.engine.v2.scheduler import CTCScheduler
from vllm_ctc_spec.engine.worker import CTCWorker, summary


def configure(pair: TinyPair, spec: dict[str, Any], **options: Any) -> Any:
    spec = {"method": "ctc", "model": str(pair.drafter), "num_speculative_tokens": 8, **spec}
    return EngineArgs(model=str(pair.target), speculative_config=spec, **options).create_engine_config()


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
def test_our_executor_replaces_vllms_multiprocess_executor_only(
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


def test_an_unsupported_vllm_is_refused_only_when_the_method_is_used(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: "0.34.0")
    assert EngineArgs(model=str(pair.target)).create_engine_config().speculative_config is None
    with pytest.raises(RuntimeError, match=r"supports vLLM >=0\.32,<0\.34, but 0\.34\.0"):
        configure(pair, {})


@pytest.mark.parametrize(("adapts", "nodes"), [(True, "up to 8"), (False, "8")])
def test_start_up_is_logged_in_one_line(adapts: bool, nodes: str) -> None:
    line = summary(EngineSettings("/models/drafter", 8, SpecOptions()), 5, "TreeCPUModelRunner", adapts)
    assert line == (
        f'Speculative method "ctc": drafter /models/drafter, 5 frames, prefix tree of {nodes} nodes per request, '
        "TreeCPUModelRunner"
    )


def test_start_up_without_a_drafter_is_logged() -> None:
    line = summary(EngineSettings(None, 8, SpecOptions(retrieval="request")), 0, "TreeCPUModelRunner", False)
    assert line.startswith('Speculative method "ctc": no drafter, retrieval request, prefix tree of 8 nodes')


def test_no_model_means_no_drafter_where_retrieval_is_on(pair: TinyPair) -> None:
    config = configure(pair, {"model": None, "retrieval": "request"})
    ours = EngineSettings.from_dict(config.additional_config["ctc_spec"])
    assert ours.drafter is None and ours.target_layers == ()
    assert is_ctc(config.speculative_config)


def test_retrieval_is_on_by_default_with_its_library_a_prefix_tree_and_v1(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retrieval(**spec: Any) -> str:
        return str(configure(pair, spec).additional_config["ctc_spec"]["options"]["retrieval"])

    assert [retrieval(), retrieval(retrieval="off"), retrieval(tree="chain")] == ["request", "off", "off"]
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        assert retrieval() == "off"
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    assert retrieval() == "off"


def test_vllms_warning_about_custom_classes_is_not_logged_for_ours(
    pair: TinyPair, caplog: pytest.LogCaptureFixture
) -> None:
    speculative = logging.getLogger("vllm.config.speculative")
    vllm.logger._print_warning_once.cache_clear()
    speculative.addHandler(caplog.handler)
    try:
        configure(pair, {})
        assert "custom class" not in caplog.text
        # vLLM's warning for another class, so that a new wording fails this test.
        vllm.logger._print_warning_once.cache_clear()
        spec = {"method": "custom_class", "model": "tests.engine.processors.AvoidRepeat", "num_speculative_tokens": 2}
        EngineArgs(model=str(pair.target), speculative_config=spec).create_engine_config()
        assert "custom class-based proposer" in caplog.text
    finally:
        speculative.removeHandler(caplog.handler)


def test_an_adaptive_budget_with_asynchronous_scheduling_needs_our_scheduler(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    # vLLM's CPU platform would turn asynchronous scheduling off.
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", lambda *arguments: None)
    theirs = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    for spec, options, expected in (
        ({}, {}, SCHEDULER),
        ({}, {"async_scheduling": True}, SCHEDULER),
        ({}, {"async_scheduling": False}, None),
        ({"adaptive_budget": False}, {}, None),
        ({"adaptive_budget": False}, {"scheduler_cls": theirs}, theirs),
    ):
        scheduler = configure(pair, spec, **options).scheduler_config
        assert (scheduler.async_scheduling, scheduler.scheduler_cls) == (
            options != {"async_scheduling": False},
            expected,
        )
    with pytest.raises(
        ValueError, match=r"scheduler_cls=.*AsyncScheduler': .*Remove scheduler_cls, set adaptive_budget"
    ):
        configure(pair, {}, scheduler_cls=theirs)
    logger = logging.getLogger("vllm.config.scheduler")
    logger.addHandler(caplog.handler)
    try:
        assert configure(pair, {}).scheduler_config.get_scheduler_cls() is CTCScheduler
        assert "custom scheduler" not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_a_connector_that_vllm_adds_later_is_refused_in_the_worker(pair: TinyPair) -> None:
    config = configure(pair, {})
    check_final(config)
    config.kv_transfer_config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    with pytest.raises(ValueError, match=r"KV connector OffloadingConnector: .*Remove one of the two"):
        CTCWorker.init_device(SimpleNamespace(vllm_config=config))


def test_options_that_v2_lacks_are_refused_where_the_user_sets_v2(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"VLLM_USE_V2_MODEL_RUNNER=1 with return_sampling_mask.*Unset"):
        configure(pair, {}, return_sampling_mask=True)
    with pytest.raises(ValueError, match=r"VLLM_USE_V2_MODEL_RUNNER=1 with retrieval='request'.*Unset"):
        configure(pair, {"retrieval": "request"})


@pytest.mark.parametrize(
    ("asked", "options", "expected"),
    [
        (None, {}, True),
        (None, {"attention_kernel": "xformers"}, False),
        (None, {"retrieval": "request"}, False),
        ("0", {}, False),
        ("1", {}, True),
    ],
)
def test_on_a_gpu_the_runner_is_vllms_choice(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, asked: str | None, options: dict[str, Any], expected: bool
) -> None:
    config = configure(pair, {})
    if asked is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
    monkeypatch.setattr("vllm.platforms.current_platform.is_cuda", lambda: True)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert settings.is_v2(config.model_config, SpecOptions(**options)) == expected


def test_a_runner_other_than_the_configured_one_is_refused(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(pair, {})
    check_final(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"vLLM chooses Model Runner V2.*Remove the setting"):
        check_final(config)
