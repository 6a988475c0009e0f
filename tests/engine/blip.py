"""A BLIP-2 with the tiny target as language model and other parts random; an image changes the answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
)

from tests.tiny_pair.target import HEAD_DIM, HIDDEN, VOCAB

IMAGE_SIZE, QUERIES = 28, 2
ATTENTION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
BLIP: dict[str, Any] = {
    "model_type": "blip-2",
    "architectures": ["Blip2ForConditionalGeneration"],
    "image_token_index": VOCAB - 1,
    "num_query_tokens": QUERIES,
    "vision_config": {**ATTENTION, "model_type": "blip_2_vision_model", "image_size": IMAGE_SIZE, "patch_size": 14},
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
    shutil.copytree(target, folder)
    config = json.loads((folder / "config.json").read_text()) | BLIP
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    random = Blip2ForConditionalGeneration(Blip2Config(**BLIP)).to(torch.bfloat16).state_dict()
    weights = {name: weight.clone() for name, weight in random.items() if not name.startswith("language_model")}
    # To the size of text embeddings.
    weights["language_projection.weight"].mul_(50)
    weights |= {f"language_model.{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _name_the_last_token(folder / "tokenizer.json", "<image>")
    Blip2Processor(
        BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": "<image>"}),
        num_query_tokens=QUERIES,
    ).save_pretrained(folder)
    return folder


def _name_the_last_token(path: Path, name: str) -> None:
    """Make the last token of the vocabulary the placeholder for images."""
    tokenizer = json.loads(path.read_text())
    last = next(token for token, number in tokenizer["model"]["vocab"].items() if number == VOCAB - 1)
    del tokenizer["model"]["vocab"][last]
    tokenizer["model"]["merges"] = [merge for merge in tokenizer["model"]["merges"] if "".join(merge) != last]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": VOCAB - 1, "content": name, **flags, "special": True})
    path.write_text(json.dumps(tokenizer))
