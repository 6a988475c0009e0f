"""The archive for a GPU machine without network access."""

from __future__ import annotations

import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import bundle, engine_wheel
from benchmarks.gpu.engine_wheel import MACHINE_CODE, PTX


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


def code_for_gpus(*entries: tuple[int, int, bytes]) -> bytes:
    """As nvcc puts it into a library; entries: kind, sm number, code."""
    headers = (struct.pack("<HHIQ12xI32x", kind, 1, 64, len(code), found) for kind, found, code in entries)
    body = b"".join(header + code for header, (_, _, code) in zip(headers, entries))
    return engine_wheel.MAGIC + struct.pack("<Q", len(body)) + body


def test_code_for_other_gpus_is_left_out() -> None:
    first = (MACHINE_CODE, 80, b"ampere__"), (MACHINE_CODE, 90, b"hopper__"), (PTX, 80, b"ptx_____")
    second = (MACHINE_CODE, 80, b"only_old"), (PTX, 80, b"compiled")
    library = b"elf" + code_for_gpus(*first) + b"between" + code_for_gpus(*second) + b"end"
    kept = engine_wheel.keep_architecture(library, 90)
    # Entries have 64 + 8 bytes.
    assert kept == (
        b"elf" + code_for_gpus(first[1]) + bytes(2 * 72) + b"between" + code_for_gpus(second[1]) + bytes(72) + b"end"
    )


def test_a_library_without_code_for_the_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="no code for sm_90"):
        engine_wheel.keep_architecture(b"elf" + code_for_gpus((MACHINE_CODE, 80, b"ampere__")), 90)


def test_pip_installs_the_slim_wheel_and_it_has_what_an_engine_needs(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    library = code_for_gpus((MACHINE_CODE, 80, bytes(range(256)) * 64), (MACHINE_CODE, 90, b"hopper__"))
    contents = {
        "vllm/__init__.py": b"__version__ = '0.33.0'\n",
        "vllm/big.h": b"left out",
        "vllm/_moe_C_stable_libtorch.abi3.so": library,
        "vllm/_C_stable_libtorch.abi3.so": library,
        "vllm-0.33.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n",
        "vllm-0.33.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp38-abi3-linux_x86_64\n",
    }
    record = "".join(f"{name},sha256=wrong,1\n" for name in [*contents, "vllm-0.33.0.dist-info/RECORD"])
    with zipfile.ZipFile(wheel, "w") as files:
        for name, content in {**contents, "vllm-0.33.0.dist-info/RECORD": record.encode()}.items():
            files.writestr(name, content)
    slim = engine_wheel.write_slim_wheel(wheel, tmp_path / "slim", 90, (engine_wheel.OPERATORS,))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(slim)], check=True)
    installed = {path.name for path in (tmp_path / "site" / "vllm").iterdir() if path.is_file()}
    assert installed == {"__init__.py", "_C_stable_libtorch.abi3.so"}
    # Without FlashAttention, an empty module of its name.
    assert (tmp_path / "site" / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.py").read_text() == ""
    assert slim.stat().st_size < 4096
