"""What the target's hidden states of training rows are a function of, as hashes that tell two runs apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from vllm_ctc_spec.training.data import TrainingRow


@dataclass(frozen=True)
class Fingerprint:
    target: str
    """sha256 over its config and weights"""
    rows: str
    """sha256 over their token ids"""
    dtype: str
    layers: list[int]
    """Those that are kept beside the last hidden states."""


def fingerprint(
    target_path: str, rows: Sequence[TrainingRow], dtype: torch.dtype, layers: Sequence[int] = ()
) -> Fingerprint:
    """`target_path`: a folder, or a hub name whose files have been downloaded."""
    return Fingerprint(_hash_target(target_path), _hash_rows(rows), str(dtype), list(layers))


def _hash_target(target_path: str) -> str:
    local = Path(target_path).is_dir()
    folder = Path(target_path if local else snapshot_download(target_path, local_files_only=True))
    weights = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise ValueError(
            f"target {target_path!r} needs model*.safetensors or pytorch_model*.bin, {str(folder)!r} has none."
        )
    whole = hashlib.sha256()
    for path in (folder / "config.json", *weights):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _hash_rows(rows: Sequence[TrainingRow]) -> str:
    whole = hashlib.sha256()
    for row in rows:
        # Without the length, ids that move from one row to the next would leave the hash the same.
        whole.update(len(row.token_ids).to_bytes(8, "little"))
        whole.update(row.token_ids.numpy().tobytes())
    return whole.hexdigest()
