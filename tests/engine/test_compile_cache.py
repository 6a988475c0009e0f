"""The key of a compiled target in vLLM's cache. test_exactness.py tests that the target is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.compilation import caching
from vllm.engine.arg_utils import EngineArgs

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.engine.plugin import register


def key(pair, spec: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    register()
    if spec is not None:
        spec = {"method": "ctc", "model": str(pair.drafter), **spec}
    arguments = EngineArgs(str(pair.target), max_model_len=512, speculative_config=spec, **options)
    return caching.aot_compile_hash_factors(arguments.create_engine_config())


def test_the_key_depends_on_the_layers_that_the_drafter_reads(pair, tmp_path: Path) -> None:
    """The key is plain vLLM's where the drafter reads the last hidden state only."""
    assert key(pair, {}) == key(pair, {"num_speculative_tokens": 5, "tree": "chain"}) != key(pair)
    config = CTCDrafterConfig.from_pretrained(pair.drafter)
    for layers in ([], [0]):
        config.target_layers = layers
        CTCDrafter(config).save_pretrained(tmp_path)
        assert (key(pair, {"model": str(tmp_path)}) == key(pair)) == (layers == [])
        assert key(pair, {"model": str(tmp_path)}) != key(pair, {})


def test_options_that_change_the_graph_change_the_key(pair) -> None:
    assert key(pair) != key(pair, dtype="float32")
    assert key(pair) != key(pair, {}, additional_config={"of": "another plugin"})


def test_the_key_has_the_number_of_threads_and_not_their_cores(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(pair)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "7")
    assert key(pair) == before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 48)
    assert key(pair) != before


def test_another_processor_changes_the_key(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(pair)
    other = torch.cpu.get_capabilities() | {"cpu_name": "another"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: other)
    assert key(pair) != before
