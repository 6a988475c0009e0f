"""LoRA adapters of the tiny target, in the files that peft writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.lora.request import LoRARequest

from tests.tiny_pair.target import HEAD_DIM, HIDDEN, VOCAB

RANK = 8
INPUTS_AND_OUTPUTS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HEAD_DIM),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, 2 * HIDDEN),
    "mlp.down_proj": (2 * HIDDEN, HIDDEN),
}
LORA: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": RANK,
    # One slot stays empty: on a CPU vLLM 0.32 applies the last one to requests without an adapter.
    "max_loras": 3,
}
"""Options of an engine that serves two adapters."""


def write_adapter(folder: Path, seed: int) -> LoRARequest:
    """Random weights for all layers, the embedding and the LM head."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float) -> Tensor:
        return scale * torch.randn(rows, columns, generator=generator)

    weights = {
        "model.embed_tokens.lora_embedding_A": random(RANK, VOCAB, 0.1),
        "model.embed_tokens.lora_embedding_B": random(HIDDEN, RANK, 0.1),
        "lm_head.lora_A.weight": random(RANK, HIDDEN, HIDDEN**-0.5),
        "lm_head.lora_B.weight": random(VOCAB, RANK, 0.1),
    }
    for layer in range(2):
        for name, (num_inputs, num_outputs) in INPUTS_AND_OUTPUTS.items():
            weights[f"model.layers.{layer}.{name}.lora_A.weight"] = random(RANK, num_inputs, num_inputs**-0.5)
            weights[f"model.layers.{layer}.{name}.lora_B.weight"] = random(num_outputs, RANK, 0.1)
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in weights})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": modules, "bias": "none"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{name}": weight for name, weight in weights.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return LoRARequest(folder.name, seed, str(folder))
