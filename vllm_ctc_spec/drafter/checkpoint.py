"""Reading a drafter folder: every fault is one ValueError that names the folder and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter.modeling import CTCDrafter

WEIGHTS = "model.safetensors"


def read_config_dict(folder: Path) -> dict[str, Any]:
    try:
        loaded = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"drafter {str(folder)!r}: config.json cannot be read ({error}).") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"drafter {str(folder)!r}: config.json holds no JSON object.")
    return loaded


def check_drafter(path: str) -> CTCDrafterConfig:
    """Read the config and verify, without loading them, that the weights are whole."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"drafter {path!r} is not a folder. Set speculative_config 'model' (or --spec-model) to the folder that "
            f"training wrote, with config.json and {WEIGHTS}."
        )
    fields = read_config_dict(folder)
    if fields.get("model_type") != CTCDrafterConfig.model_type:
        raise ValueError(
            f"drafter {path!r} has model_type {fields.get('model_type')!r}, not {CTCDrafterConfig.model_type!r}. "
            f"Point speculative_config 'model' to a CTC drafter."
        )
    config = CTCDrafterConfig.from_dict(fields)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CTCDrafter(config).state_dict().items()}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"drafter {path!r}: {WEIGHTS} is missing or truncated ({error}). Copy or train the drafter again."
        ) from error
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"drafter {path!r}: {WEIGHTS} does not hold what config.json describes; first difference: {wrong[0]!r} "
            f"has shape {found.get(wrong[0])}, expected {expected.get(wrong[0])}."
        )
    return config


def load_drafter(path: str, dtype: torch.dtype) -> CTCDrafter:
    return CTCDrafter.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
