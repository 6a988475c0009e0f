"""What a drafter calls the target that it was trained for, wherever that target lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

WEIGHTS = "model*.safetensors"


def target_names(target: str, revision: str | None = None, cache_dir: str | None = None) -> list[str]:
    """The target's name on the Hugging Face hub, if it has one, and `fingerprint`, if its weights are on this machine.

    target: a folder or a hub name. cache_dir: None for the hub's usual cache.
    """
    folder = _local_folder(target, revision, cache_dir)
    names = [
        _hub_name(folder) if Path(target).is_dir() else target,
        fingerprint(folder) if folder is not None else None,
    ]
    return [name for name in names if name is not None]


def fingerprint(folder: Path) -> str | None:
    """Of a target's weights, however they are split into files; None without safetensors.

    It covers name, shape and first row of every tensor, because reading all of a large target takes minutes.
    """
    digests = {}
    for path in folder.glob(WEIGHTS):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118, it is no mapping.
                rows = weights.get_slice(name)
                shape = list(rows.get_shape())
                row = rows[:1] if shape else weights.get_tensor(name)[None]
                told = f"{name} {shape} {row.dtype}".encode() + row.flatten().view(torch.uint8).numpy().tobytes()
                digests[name] = hashlib.sha256(told).digest()
    if not digests:
        return None
    return f"sha256:{hashlib.sha256(b''.join(digests[name] for name in sorted(digests))).hexdigest()}"


def _local_folder(target: str, revision: str | None, cache_dir: str | None) -> Path | None:
    if Path(target).is_dir():
        return Path(target)
    try:
        return Path(
            snapshot_download(
                target, revision=revision, cache_dir=cache_dir, allow_patterns=[WEIGHTS], local_files_only=True
            )
        )
    except (OSError, ValueError):
        return None


def _hub_name(folder: Path | None) -> str | None:
    """Of models--ORGANISATION--NAME/snapshots/COMMIT in the hub's cache, which offline engines have instead."""
    if folder is None or folder.absolute().parent.name != "snapshots":
        return None
    kind, *parts = folder.absolute().parents[1].name.split("--")
    return "/".join(parts) if kind == "models" else None
