"""Converts a quantised GGUF file to a Hugging Face model, for vLLM and for training."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and chat template of `gguf` into `folder`, its weights dequantised to bfloat16."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Weights that stay quantised cannot be saved.
    quantization = GgufConfig(dequantize=True)
    # Not all progress bars of transformers can be switched off.
    with redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=quantization, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
