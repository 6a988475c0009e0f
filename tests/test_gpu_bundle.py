"""The archive for a GPU machine without network access."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import bundle


def make_wheel(folder: Path, requires: str) -> Path:
    wheel = folder / "kernels-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        metadata = (
            f"Metadata-Version: 2.1\nName: kernels\nVersion: 1.0\nRequires-Dist: numpy\nRequires-Dist: {requires}\n"
        )
        files.writestr("kernels-1.0.dist-info/METADATA", metadata)
    return wheel


def test_a_wheel_for_another_torch_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"kernels-1\.0.*needs torch==2\.13\.0, the machine has torch 2\.11\.0"):
        bundle.check_torch(make_wheel(tmp_path, "torch==2.13.0"), "2.11.0")


@pytest.mark.parametrize("requires", ["torch>=2.10", "torch", "torch-scatter==2.1"])
def test_a_wheel_that_fits_is_taken(tmp_path: Path, requires: str) -> None:
    bundle.check_torch(make_wheel(tmp_path, requires), "2.11.0")


def test_the_bundle_holds_all_that_the_check_runs(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "torch")
    size = bundle.pack(tmp_path / "bundle.tar.gz", bundle.tracked_files(), [wheel], max_mib=60)
    with tarfile.open(tmp_path / "bundle.tar.gz") as packed:
        names = {name.removeprefix(f"{bundle.FOLDER}/") for name in packed.getnames()}
    assert size == (tmp_path / "bundle.tar.gz").stat().st_size
    assert {"Makefile", "pyproject.toml", "benchmarks/gpu/check.sh", f"wheels/{wheel.name}"} <= names
    assert {"tests/ops/test_gpu.py", "vllm_ctc_spec/ops/triton/attention.py"} <= names
    assert not any(name.startswith("benchmarks/results/") for name in names)


def test_a_bundle_that_is_too_large_is_not_written(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "torch")
    with pytest.raises(
        ValueError, match=r"--max-mib 0\.0001: the bundle has .* MiB\. Leave out kernels-1\.0.* or allow"
    ):
        bundle.pack(tmp_path / "bundle.tar.gz", ["LICENSE"], [wheel], max_mib=0.0001)
    assert sorted(tmp_path.iterdir()) == [wheel]
