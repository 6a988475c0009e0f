"""From what a user calls a drafter to its folder: a path, a name on the Hugging Face hub, or the target's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

import vllm_ctc_spec
from vllm_ctc_spec.drafter.checkpoint import WEIGHTS, is_drafter, read_config_dict
from vllm_ctc_spec.files import user_cache
from vllm_ctc_spec.target_names import target_names

OWN = "ctc-drafter"
"""In place of a name: the drafter that belongs to the target. The target's folder has it under this name."""

FILES = ["config.json", WEIGHTS]
SHIPPED = Path(vllm_ctc_spec.__file__).parent / "drafters"


@dataclass(frozen=True)
class Hub:
    """How the Hugging Face hub is asked; None is what its client does by default."""

    cache_dir: str | None = None
    token: str | bool | None = None


def find_drafter(
    model: Any, target: str, revision: str | None = None, target_revision: str | None = None, hub: Hub | None = None
) -> str:
    """The folder of the drafter that `model` names, downloaded if need be; it is not read.

    model: a path, a hub name, or OWN or None for the drafter that belongs to `target`, a folder or a hub name; a path
    that exists goes before a name. revision: of the hub name. Raises ValueError that says what to do.
    """
    hub = hub or Hub()
    if model is None:
        return _own_drafter(target, target_revision, hub)
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise ValueError(
            f"speculative_config 'model'={model!r}: set it (or --spec-model) to the folder of a trained CTC drafter or "
            "to its name on the Hugging Face hub, or leave it out for the target's own."
        )
    path = os.path.expanduser(model)
    if Path(path).exists():
        return path
    if path == OWN:
        return _own_drafter(target, target_revision, hub)
    return _from_hub(path, revision, hub) if is_hub_name(path) else path


def is_hub_name(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _from_hub(name: str, revision: str | None, hub: Hub) -> str:
    try:
        return snapshot_download(
            name, revision=revision, cache_dir=hub.cache_dir, token=hub.token, allow_patterns=FILES
        )
    # Of the hub's client and of its HTTP library, which differs between its versions.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        at = f" at revision {revision!r}" if revision is not None else ""
        raise ValueError(
            f"drafter {name!r} is not a folder, and cannot be fetched from the Hugging Face hub{at} "
            f"({reason}). Check the name, the network and HF_TOKEN, or set speculative_config "
            "'model' (or --spec-model) to the folder that training wrote."
        ) from error


def _own_drafter(target: str, revision: str | None, hub: Hub) -> str:
    beside = Path(target) / OWN
    if beside.is_dir():
        return str(beside)
    names = target_names(target, revision, hub.cache_dir)
    for folder in _known_drafters(hub):
        targets = read_config_dict(folder).get("targets")
        if isinstance(targets, list) and any(name in targets for name in names):
            return str(folder)
    raise ValueError(
        f"no CTC drafter on this machine belongs to target {target!r}. Train one with `vllm-ctc-spec train all "
        f"{target} PROMPTS OUTPUT` and move OUTPUT/drafter to {str(user_cache('drafters') / 'NAME')!r}, or name one in "
        "speculative_config 'model' (or --spec-model)."
    )


def _known_drafters(hub: Hub) -> Iterator[Path]:
    """Those in the user's caches, the latest first, then those of the package."""
    downloaded = Path(hub.cache_dir or constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    cached = filter(is_drafter, (*user_cache("drafters").glob("*"), *downloaded))
    yield from sorted(cached, key=lambda folder: (folder / "config.json").stat().st_mtime, reverse=True)
    yield from filter(is_drafter, sorted(SHIPPED.glob("*")))


def names_a_drafter(model: Any, revision: str | None = None, hub: Hub | None = None) -> bool:
    """Whether `find_drafter` would find a CTC drafter under this name, and not a model of another kind or none."""
    hub = hub or Hub()
    if not isinstance(model, str | os.PathLike):
        return False
    folder = Path(model).expanduser()
    if folder.exists() or not is_hub_name(model):
        return is_drafter(folder)
    if model == OWN:
        return True
    try:
        config = hf_hub_download(str(model), "config.json", revision=revision, cache_dir=hub.cache_dir, token=hub.token)
    # As in `_from_hub`. vLLM, which takes the name for one of another method then, says what is wrong with it.
    except Exception:
        return False
    return is_drafter(Path(config).parent)
