"""Packs what a GPU machine without network access needs for `make gpu-check` into one archive.

    python -m benchmarks.gpu.bundle [ARCHIVE] [--wheels REQUIREMENT ...] [--max-mib 60]

The archive holds this checkout's package, tests and benchmarks, and wheels for Python 3.12 on x86-64 Linux. A wheel
that does not exist for these, or that needs another torch than the machine has, is left out, and the reason is printed.
There, with torch, triton, transformers, numba, pytest and hypothesis:

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

ROOT = Path(__file__).parents[2]
PARTS = ("vllm_ctc_spec", "tests", "benchmarks", "Makefile", "pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = "benchmarks/results/"
FOLDER = "vllm-ctc-spec"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
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


def pack(archive: Path, files: list[str], wheels: list[Path], max_mib: float) -> int:
    """Writes the archive and returns its size in bytes. Raises ValueError, and writes nothing, if it is too large."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".part")
    try:
        with tarfile.open(partial, "w:gz") as packed:
            for path in files:
                packed.add(ROOT / path, f"{FOLDER}/{path}")
            for wheel in wheels:
                packed.add(wheel, f"{FOLDER}/wheels/{wheel.name}")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, nargs="?", default=Path("gpu-bundle.tar.gz"))
    parser.add_argument("--wheels", nargs="*", default=["xformers"], help="pip requirements (default: xformers)")
    parser.add_argument("--python", default="3.12", help="of the GPU machine (default %(default)s)")
    parser.add_argument("--torch", default="2.11.0", help="of the GPU machine (default %(default)s)")
    parser.add_argument("--max-mib", type=float, default=60, help="largest archive (default %(default)s)")
    options = parser.parse_args()
    wheels = []
    with tempfile.TemporaryDirectory() as folder:
        for requirement in options.wheels:
            try:
                wheel = fetch_wheel(requirement, options.python, Path(folder))
                check_torch(wheel, options.torch)
                wheels.append(wheel)
            except LookupError as reason:
                print(f"gpu-bundle: left out {requirement}: {reason}")
        try:
            size = pack(options.archive, tracked_files(), wheels, options.max_mib)
        except (ValueError, RuntimeError) as error:
            print(f"gpu-bundle: {error}", file=sys.stderr)
            return 1
    names = ", ".join(wheel.name for wheel in wheels) or "none"
    print(f"{options.archive}: {size / MIB:.1f} MiB; wheels: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
