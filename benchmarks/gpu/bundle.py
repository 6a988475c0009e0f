"""Packs what a GPU machine without network access needs for `make gpu-check` into one archive.

    python -m benchmarks.gpu.bundle [ARCHIVE] [--engine] [--wheels REQUIREMENT ...] [--max-mib 60]

The archive holds this checkout's package, tests and benchmarks, and wheels for Python 3.12 on x86-64 Linux. A wheel
that does not exist for these, or that needs another torch than the machine has, is left out, and the reason is printed.
With --engine it also holds vLLM, slimmed to one kind of GPU, what vLLM imports beside the packages named below, and the
tests' target and drafter: that is all that `engine_check` needs. There is no room for xformers then.
There, with torch, triton, transformers, numba, pytest and hypothesis (for --engine also aiohttp, cloudpickle, einops,
filelock, httpx, pillow, prometheus-client, protobuf, psutil, py-cpuinfo, regex, requests, rich, sentencepiece, tiktoken
and uvloop):

    tar xzf gpu-bundle.tar.gz && cd vllm-ctc-spec && make gpu-check

Exit status: 1 if the archive would be larger than --max-mib; none is written then.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.gpu.engine_wheel import FLASH, OPERATORS, write_slim_wheel

ROOT = Path(__file__).parents[2]
PARTS = ("vllm_ctc_spec", "tests", "benchmarks", "Makefile", "pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = "benchmarks/results/"
FOLDER = "vllm-ctc-spec"
PLATFORMS = tuple(f"{name}_x86_64" for name in ("manylinux_2_31", "manylinux_2_28", "manylinux_2_17", "manylinux2014"))
ENGINE = "vllm==0.33.0"
ENGINE_IMPORTS = (
    "annotated-types==0.8.0", "apache-tvm-ffi==0.1.11", "cachetools==8.0.2", "cbor2==6.3.0", "fastapi==0.136.3",
    "httpcore2==2.16.2", "httpx2==2.16.2", "llguidance==1.7.6", "msgspec==0.22.0", "openai==3.57.0",
    "oss-harmony==0.0.11",
    "partial-json-parser==0.2.1.1.post7", "pybase64==1.5.1", "pydantic==2.14.4", "pydantic-core==2.50.5",
    "pydantic-extra-types==2.11.1", "pyzmq==27.3.0", "sniffio==1.3.1", "starlette==1.10.0", "truststore==0.10.5",
    "typing-inspection==0.4.5", "xgrammar==0.2.8",
)  # fmt: skip
"""What vLLM imports on the way to an engine. `vllm.v1.structured_output` needs xgrammar, which needs apache-tvm-ffi."""
PAIR = ("target", "drafter", "corpus/heldout.jsonl")
MIB = 1 << 20


def tracked_files() -> list[str]:
    """Paths below ROOT. Raises RuntimeError outside of a git checkout."""
    listed = subprocess.run(["git", "ls-files", *PARTS], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise RuntimeError(f"gpu-bundle packs the files that git tracks, and git failed: {listed.stderr.strip()}")
    paths = (path for path in listed.stdout.splitlines() if not path.startswith(LEFT_OUT))
    return [path for path in paths if (ROOT / path).exists()]


def fetch_wheel(requirement: str, python: str, folder: Path) -> Path:
    """A wheel of `requirement` for that Python version, without its dependencies. Raises LookupError without one."""
    where = folder / re.sub(r"\W", "_", requirement)
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--implementation", "cp", *platforms, "--dest", str(where), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LookupError(f"pip has no wheel for Python {python}: {done.stderr.strip().splitlines()[-1]}")
    return next(where.glob("*.whl"))


def check_torch(wheel: Path, torch: str) -> None:
    """Raises LookupError if the wheel needs another version of torch."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(files.read(name).decode())
    for requirement in map(Requirement, metadata.get_all("Requires-Dist", [])):
        if requirement.name == "torch" and not requirement.specifier.contains(torch, prereleases=True):
            raise LookupError(f"{wheel.name} needs {requirement}, the machine has torch {torch}")


def pack(archive: Path, files: list[str], wheels: list[Path], max_mib: float, pair: Path | None = None) -> int:
    """Writes the archive and returns its size in bytes. Raises ValueError, and writes nothing, if it is too large.

    pair: folder of a target and its drafter, as tests.tiny_pair builds it.
    """
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".part")
    try:
        with tarfile.open(partial, "w:gz") as packed:
            for path in files:
                packed.add(ROOT / path, f"{FOLDER}/{path}")
            for wheel in wheels:
                packed.add(wheel, f"{FOLDER}/wheels/{wheel.name}")
            for path in PAIR if pair else ():
                packed.add(pair / path, f"{FOLDER}/pair/{path}")
        size = partial.stat().st_size
        if size > max_mib * MIB:
            largest = max(wheels, key=lambda wheel: wheel.stat().st_size, default=None)
            remedy = f"Leave out {largest.name} (--wheels)" if largest else "Remove files"
            raise ValueError(
                f"--max-mib {max_mib:g}: the bundle has {size / MIB:.1f} MiB. {remedy} or allow more with --max-mib."
            )
        partial.replace(archive)
    finally:
        partial.unlink(missing_ok=True)
    return size


def collect_wheels(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Those that fit the machine; says which do not. Raises LookupError if one is missing that the engine needs."""
    wheels = []
    for requirement in options.wheels:
        try:
            wheel = fetch_wheel(requirement, options.python, folder)
            check_torch(wheel, options.torch)
            wheels.append(wheel)
        except LookupError as reason:
            print(f"gpu-bundle: left out {requirement}: {reason}")
    if options.engine:
        wheels += [fetch_wheel(requirement, options.python, folder) for requirement in ENGINE_IMPORTS]
        # It asks for a newer torch. README.md says what is known about that.
        full = fetch_wheel(ENGINE, options.python, folder)
        libraries = (OPERATORS, FLASH) if options.flash else (OPERATORS,)
        wheels.append(write_slim_wheel(full, folder, options.architecture, libraries))
    return wheels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, nargs="?", default=Path("gpu-bundle.tar.gz"))
    parser.add_argument("--engine", action="store_true", help="with vLLM, for engine_check")
    parser.add_argument("--flash", action="store_true", help="for --engine: with FlashAttention-3, 14 MiB more")
    parser.add_argument("--pair", type=Path, help="for --engine: folder of tests.tiny_pair (default: trained now)")
    parser.add_argument("--wheels", nargs="*", help="pip requirements (default: xformers, none with --engine)")
    parser.add_argument("--python", default="3.12", help="of the GPU machine (default %(default)s)")
    parser.add_argument("--torch", default="2.11.0", help="of the GPU machine (default %(default)s)")
    parser.add_argument("--architecture", type=int, default=90, help="for --engine: its GPU (default %(default)s)")
    parser.add_argument("--max-mib", type=float, default=60, help="largest archive (default %(default)s)")
    options = parser.parse_args()
    if options.wheels is None:
        options.wheels = [] if options.engine else ["xformers"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheels = collect_wheels(options, Path(folder))
            pair = _pair(options, Path(folder)) if options.engine else None
            size = pack(options.archive, tracked_files(), wheels, options.max_mib, pair)
        except (LookupError, ValueError, RuntimeError) as error:
            print(f"gpu-bundle: {error}", file=sys.stderr)
            return 1
    names = ", ".join(wheel.name for wheel in wheels) or "none"
    print(f"{options.archive}: {size / MIB:.1f} MiB; wheels: {names}")
    return 0


def _pair(options: argparse.Namespace, folder: Path) -> Path:
    if options.pair is not None:
        return options.pair
    from tests.tiny_pair import build_tiny_pair

    build_tiny_pair(folder / "pair")
    return folder / "pair"


if __name__ == "__main__":
    sys.exit(main())
