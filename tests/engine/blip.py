"""The tiny target as the language model of a BLIP-2, to which nobody sends an image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_pair.target import HEAD_DIM, HIDDEN, VOCAB

ATTENTION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
BLIP: dict[str, Any] = {
    "model_type": "blip-2",
    "architectures": ["Blip2ForConditionalGeneration"],
    "image_token_index": VOCAB - 1,
    "num_query_tokens": 2,
    "vision_config": {**ATTENTION, "model_type": "blip_2_vision_model", "image_size": 28, "patch_size": 14},
    "qformer_config": {**ATTENTION, "model_type": "blip_2_qformer", "encoder_hidden_size": 64},
    "text_config": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
}
"""Fields of config.json."""


def write_blip(target: Path, folder: Path) -> Path:
    """Without the weights of what reads images."""
    shutil.copytree(target, folder)
    config = json.loads((folder / "config.json").read_text()) | BLIP
    (folder / "config.json").write_text(json.dumps(config))
    weights = {f"language_model.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    weights["query_tokens"] = torch.zeros(1, 2, 64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
