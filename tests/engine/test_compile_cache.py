"""What of an engine is in the key of its compiled target, and what is not. That it is loaded: test_exactness.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.compilation import caching
from vllm.engine.arg_utils import EngineArgs

from vllm_ctc_spec.engine.plugin import register


def key(pair, spec: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    register()
    if spec is not None:
        spec = {"method": "ctc", "model": str(pair.drafter), **spec}
    arguments = EngineArgs(str(pair.target), max_model_len=512, speculative_config=spec, **options)
    return caching.aot_compile_hash_factors(arguments.create_engine_config())


def test_plain_vllm_and_our_method_share_one_compiled_target(pair) -> None:
    assert key(pair) == key(pair, {}) == key(pair, {"num_speculative_tokens": 5, "tree": "chain"})


def test_what_changes_the_graph_makes_another_key(pair) -> None:
    assert key(pair) != key(pair, dtype="float32")
    assert key(pair) != key(pair, {}, additional_config={"of": "another plugin"})


def test_cores_are_in_the_key_by_their_number_only(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(pair)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "7")
    assert key(pair) == before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 48)
    assert key(pair) != before


def test_another_processor_makes_another_key(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(pair)
    other = torch.cpu.get_capabilities() | {"cpu_name": "another"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: other)
    assert key(pair) != before
