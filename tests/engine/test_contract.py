"""One red test, with a list, when a new vLLM moves something that we touch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_ctc_spec.engine import compat


def test_everything_that_we_touch_exists_in_the_installed_vllm() -> None:
    assert compat.missing_attributes() == []


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: "0.31.1")
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.32\.x, but 0\.31\.1 is installed"):
        compat.require_supported_vllm()


def test_registering_twice_wraps_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ctc_spec.engine.plugin import register

    register()
    once = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is once


def test_only_the_engine_package_imports_vllm() -> None:
    modules = "vllm_ctc_spec.algorithm, vllm_ctc_spec.drafter, vllm_ctc_spec.reference, vllm_ctc_spec.cli"
    program = f"import sys, {modules}; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
