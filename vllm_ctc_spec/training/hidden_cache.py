"""The frozen target's hidden states on disk, so that a fit of many epochs runs the target once over the rows.

    manifest.json                      fingerprint of target and rows, and the rows of each shard; written first
    hidden-00001.safetensors, ...      [N, W] each, the shard's rows one after the other without padding

Letters: L tokens of a row, N tokens of a shard, W width of the hidden states of all layers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import logging

from vllm_ctc_spec.files import write_atomically
from vllm_ctc_spec.training.data import TrainingRow
from vllm_ctc_spec.training.hidden_sources import HiddenSource, hidden_width


@dataclass(frozen=True)
class Fingerprint:
    target: str
    """sha256 over its config and weights"""
    rows: str
    """sha256 over their token ids"""
    dtype: str
    layers: list[int]
    """Layers whose outputs are kept beside the last hidden states."""
    engine: dict[str, Any] | None = None
    """Of an engine that computed them, the options on which they depend; None for the model in the process itself."""


def fingerprint(
    target_path: str,
    rows: Sequence[TrainingRow],
    dtype: torch.dtype,
    layers: Sequence[int] = (),
    engine: Mapping[str, Any] | None = None,
) -> Fingerprint:
    """target_path: a folder, or a hub name whose files have been downloaded. Raises ValueError without weights."""
    options = None if engine is None else dict(engine)
    return Fingerprint(_hash_target(target_path), _hash_rows(rows), str(dtype), list(layers), options)


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
        # Without the lengths, moving ids from one row to the next would not change the hash.
        whole.update(len(row.token_ids).to_bytes(8, "little"))
        whole.update(row.token_ids.numpy().tobytes())
    return whole.hexdigest()


MANIFEST = "manifest.json"
DISK_MARGIN = 256 << 20
"""Bytes to leave free on the disk, for checkpoints and logs."""


@dataclass(frozen=True)
class Manifest:
    made_of: Fingerprint
    width: int
    shards: list[list[int]]
    """Row numbers of each shard, in the shard's order."""

    def to_json(self) -> bytes:
        fields = asdict(self)
        if self.made_of.engine is None:
            # So that shards of earlier versions, which had no engines, stay whole.
            del fields["made_of"]["engine"]
        return json.dumps(fields).encode()

    @cached_property
    def digest(self) -> str:
        """Written into each shard, so that a shard of another cache is recognised."""
        return hashlib.sha256(self.to_json()).hexdigest()


class HiddenCache:
    """Row number -> [L, W] hidden states, as `target_hidden` returns them.

    Raises ValueError if the cache is incomplete, or was made of another target, other rows or another number type, or
    by an engine with other options.
    """

    def __init__(
        self,
        folder: Path,
        target_path: str,
        rows: Sequence[TrainingRow],
        dtype: torch.dtype,
        layers: Sequence[int] = (),
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        manifest = _read_manifest(folder, fingerprint(target_path, rows, dtype, layers, engine))
        self._places: dict[int, tuple[Path, int, int]] = {}
        self._open: dict[Path, Any] = {}
        for shard, members in enumerate(manifest.shards):
            path, stop = _shard_path(folder, shard), 0
            for row in members:
                start, stop = stop, stop + len(rows[row].token_ids)
                self._places[row] = (path, start, stop)
            if defect := _defect(path, stop, manifest):
                raise ValueError(
                    f"cache file {str(path)!r} is not whole ({defect}). Run the command that writes it again."
                )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> Tensor:
        """[L, W], a view of the memory-mapped file."""
        path, start, stop = self._places[row]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return self._open[path].get_slice("hidden")[start:stop]

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be pickled; a data loader's worker opens its own.
        return self.__dict__ | {"_open": {}}


def write_cache(
    folder: Path,
    source: HiddenSource,
    target_path: str,
    rows: Sequence[TrainingRow],
    layers: Sequence[int] = (),
    shard_bytes: int = 1 << 30,
) -> None:
    """Write the shards that are missing or incomplete in `folder`; a run that was killed continues here.

    source: of the target in `target_path`; its number type is the cache's. layers: see `target_hidden`. shard_bytes:
    most bytes of a shard; an existing cache keeps its shards. Raises ValueError if `folder` holds another cache, if the
    disk is too small, or if the source fails.
    """
    dtype = source.target.dtype
    made_of = fingerprint(target_path, rows, dtype, layers, source.engine)
    lengths = [len(row.token_ids) for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        manifest = _read_manifest(folder, made_of)
    else:
        width = hidden_width(source.target, layers)
        manifest = Manifest(made_of, width, plan_shards(lengths, width * dtype.itemsize, shard_bytes))
    sizes = [sum(lengths[row] for row in members) for members in manifest.shards]
    missing = [shard for shard, size in enumerate(sizes) if _defect(_shard_path(folder, shard), size, manifest)]
    num_tokens = sum(sizes[shard] for shard in missing)
    _check_disk(folder, num_tokens * manifest.width * dtype.itemsize)
    _write_whole(folder / MANIFEST, manifest.to_json())
    if not missing:
        return
    wanted = [lengths[row] for shard in missing for row in manifest.shards[shard]]
    with (
        logging.tqdm(total=num_tokens, unit="token", unit_scale=True, desc="hidden states") as progress,
        source.started(wanted, layers, progress.update) as compute,
    ):
        for shard in missing:
            hidden = compute([rows[row].token_ids for row in manifest.shards[shard]])
            contents = save({"hidden": hidden.cpu()}, metadata={"manifest": manifest.digest})
            _write_whole(_shard_path(folder, shard), contents)


def plan_shards(lengths: Sequence[int], token_bytes: int, shard_bytes: int) -> list[list[int]]:
    """Row numbers of each shard, longest rows first, so that neighbours, which share a batch, need little padding.

    A shard has at most `shard_bytes`, or one row that alone is larger.
    """
    shards: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if lengths[row] * token_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(row)
        room -= lengths[row] * token_bytes
    return shards


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"hidden-{shard + 1:05}.safetensors"


def _read_manifest(folder: Path, wanted: Fingerprint) -> Manifest:
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
        manifest = Manifest(**fields | {"made_of": Fingerprint(**fields["made_of"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{str(path)!r} is not the manifest of a cache ({error}). Delete the folder, or choose another --cache."
        ) from error
    found = asdict(manifest.made_of)
    if other := [name for name, value in asdict(wanted).items() if found[name] != value]:
        raise ValueError(
            f"cache {str(folder)!r} was made with another {', another '.join(other)}. Delete the folder, or choose "
            "another --cache."
        )
    return manifest


def _defect(path: Path, num_tokens: int, manifest: Manifest) -> str | None:
    """Why the file is not this shard of `num_tokens`, judged by its header and size; None if it is."""
    try:
        with safe_open(path, "pt") as file:
            hidden = file.get_slice("hidden")
            found = (file.metadata(), hidden.get_shape(), str(hidden[:0].dtype))
    except (OSError, SafetensorError) as error:
        return str(error)
    expected = ({"manifest": manifest.digest}, [num_tokens, manifest.width], manifest.made_of.dtype)
    return None if found == expected else f"holds {found}, expected {expected}"


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + DISK_MARGIN:
        raise ValueError(
            f"cache {str(folder)!r} needs {needed:,} bytes and {DISK_MARGIN:,} to spare; its disk has {free:,} free. "
            "Free some, or choose a --cache on another disk."
        )


def _write_whole(path: Path, contents: bytes) -> None:
    """`write_atomically`, with an error that names the remedy."""
    try:
        write_atomically(path, contents)
    except OSError as error:
        raise ValueError(
            f"cache file {str(path)!r} of {len(contents):,} bytes cannot be written ({error.strerror}). Files before "
            "it are whole: make room and run the same command again, or choose another --cache."
        ) from error
