"""vLLM's CUDA wheel without what one engine on one kind of GPU does not need: 330 MB become about 25 MiB.

Left out are headers and the libraries of other kernels, and of the kept libraries the code for other GPUs. Zeros that
compress to nothing take its place, so that nothing else moves. Where a kernel has no code for this GPU its PTX stays,
which the driver compiles. The layout of .nv_fatbin is not documented: `cuobjdump --list-elf` tells whether it was
understood.
"""

from __future__ import annotations

import csv
import io
import struct
import zipfile
from pathlib import Path, PurePosixPath

OPERATORS = "vllm/_C_stable_libtorch.abi3.so"
FLASH = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
"""vLLM's default attention on Hopper; 14 MiB when compressed."""
SUFFIXES = (".py", ".json", ".jinja")

MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)
SIZE = struct.Struct("<Q")
"""Behind the magic: bytes of all entries."""
ENTRY = struct.Struct("<HHIQ12xI")
"""Kind, version, bytes of this header, bytes of the code, and, after its compression, the entry's sm number."""
PTX, MACHINE_CODE = 1, 2


def write_slim_wheel(wheel: Path, folder: Path, architecture: int, libraries: tuple[str, ...]) -> Path:
    """A wheel of the same name in `folder`. architecture: compute capability times ten, 90 for Hopper."""
    slim = folder / wheel.name
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(slim, "w", zipfile.ZIP_LZMA) as kept:
        names = {name for name in full.namelist() if name in libraries or _is_kept(PurePosixPath(name))}
        for name in sorted(names):
            content = full.read(name)
            if name in libraries:
                content = keep_architecture(content, architecture)
            elif name.endswith(".dist-info/RECORD"):
                content = _record(content.decode(), names)
            kept.writestr(name, content)
        if FLASH not in libraries:
            # Without a module of this name vLLM imports no attention at all, that in Triton included.
            kept.writestr(FLASH.replace(".abi3.so", ".py"), "")
    return slim


def _is_kept(path: PurePosixPath) -> bool:
    return path.parts[0].endswith(".dist-info") or path.suffix in SUFFIXES


def _record(record: str, names: set[str]) -> bytes:
    """Without the files that are left out, and without checksums, of which some would be wrong."""
    rows = io.StringIO()
    csv.writer(rows).writerows((name, "", "") for name, *_ in csv.reader(record.splitlines()) if name in names)
    return rows.getvalue().encode()


def keep_architecture(library: bytes, architecture: int) -> bytes:
    """`library` without the code that this architecture does not load, at its old size: zeros follow what is kept.

    Raises ValueError if there is no code for the architecture.
    """
    content, at, num_kept = bytearray(library), library.find(MAGIC), 0
    while at >= 0:
        first = start = at + len(MAGIC) + SIZE.size
        end = start + SIZE.unpack_from(library, at + len(MAGIC))[0]
        entries = []
        while start < end:
            kind, _, header, num_bytes, found = ENTRY.unpack_from(library, start)
            entries.append((kind, found, library[start : start + header + num_bytes]))
            start += header + num_bytes
        has_code = (MACHINE_CODE, architecture) in {entry[:2] for entry in entries}
        kept = b"".join(
            entry
            for kind, found, entry in entries
            if (kind, found) == (MACHINE_CODE, architecture) or (kind == PTX and not has_code)
        )
        SIZE.pack_into(content, at + len(MAGIC), len(kept))
        content[first:end] = kept.ljust(end - first, b"\0")
        num_kept += len(kept)
        at = library.find(MAGIC, end)
    if not num_kept:
        raise ValueError(f"the library has no code for sm_{architecture}")
    return bytes(content)
