"""Reads a drafter folder. Every fault raises one ValueError that names the folder and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter.modeling import CTCDrafter

WEIGHTS = "model.safetensors"
PICKLED = "pytorch_model.bin"
DTYPES = ("float32", "float16", "bfloat16")


def read_config_dict(folder: Path) -> dict[str, Any]:
    try:
        loaded = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"drafter {str(folder)!r}: config.json cannot be read ({error}).") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"drafter {str(folder)!r}: config.json holds no JSON object.")
    return loaded


def check_drafter(path: str) -> CTCDrafterConfig:
    """Check config and weights of a drafter folder, and return the config. Raises ValueError."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"drafter {path!r} is not a folder. Set speculative_config 'model' (or --spec-model) to the folder that "
            f"training wrote, with config.json and {WEIGHTS}."
        )
    config = _read_config(path)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CTCDrafter(config).state_dict().items()}
    if not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        raise ValueError(
            f"drafter {path!r} holds {PICKLED}, which is not read. Write {WEIGHTS} with the model's save_pretrained."
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            if wrong:
                raise ValueError(
                    f"drafter {path!r}: {WEIGHTS} does not hold what config.json describes; first difference: "
                    f"{wrong[0]!r} has shape {found.get(wrong[0])}, expected {expected.get(wrong[0])}."
                )
            for name in expected:
                _check_values(path, name, weights.get_tensor(name), config)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"drafter {path!r}: {WEIGHTS} is missing or truncated ({error}). Copy or train the drafter again."
        ) from error
    return config


def _read_config(path: str) -> CTCDrafterConfig:
    fields = read_config_dict(Path(path))
    if fields.get("model_type") != CTCDrafterConfig.model_type:
        raise ValueError(
            f"drafter {path!r} has model_type {fields.get('model_type')!r}, not {CTCDrafterConfig.model_type!r}. "
            f"Point speculative_config 'model' to a CTC drafter."
        )
    if fields.get("dtype") not in (None, *DTYPES):
        raise ValueError(
            f"drafter {path!r}: dtype={fields['dtype']!r} in the drafter's config.json: use one of {', '.join(DTYPES)}."
        )
    try:
        return CTCDrafterConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"drafter {path!r}: {error}") from error


def _check_values(path: str, name: str, tensor: Tensor, config: CTCDrafterConfig) -> None:
    if name == "draft_vocab":
        is_good = not tensor.is_floating_point() and len(tensor.unique()) == len(tensor)
        if not is_good or not 0 <= int(tensor.min()) <= int(tensor.max()) < config.vocab_size:
            raise ValueError(
                f"drafter {path!r}: 'draft_vocab' in {WEIGHTS} must be different token ids from 0 to "
                f"{config.vocab_size - 1}. Copy or train the drafter again."
            )
    elif not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        what = "values that are no finite numbers" if tensor.is_floating_point() else f"dtype {tensor.dtype}"
        raise ValueError(
            f"drafter {path!r}: {name!r} in {WEIGHTS} has {what}: use finite floating-point weights. Copy or train the "
            "drafter again."
        )


def load_drafter(path: str, dtype: torch.dtype) -> CTCDrafter:
    """The drafter for inference, without the checks of `check_drafter`."""
    return CTCDrafter.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
