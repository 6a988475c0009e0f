"""A fit that starts from the weights of another drafter."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.drafter.checkpoint import WEIGHTS, check_drafter

CHOSEN_FROM_ROWS = "draft_vocab"
OF_TARGET_LAYERS = ("layer_norms.", "layers_proj.")
SAME = (
    "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "num_hidden_layers", "num_frames", "emission", "condition_rank", "has_blank",
)  # fmt: skip
"""Fields that the weights' names and shapes depend on."""


@torch.no_grad()
def start_from(drafter: CTCDrafter, folder: str | Path) -> None:
    """Give `drafter` the weights of the one in `folder`, which may read the target's last hidden state alone.

    The product of layers that the other does not read starts at zero, so that both draft alike at first. The tokens
    that are drafted stay those of `drafter`. Raises ValueError that names the setting in which the two differ.
    """
    other, config = check_drafter(str(folder)), drafter.config
    for field in ("target_layers", *SAME):
        theirs, ours = getattr(other, field), getattr(config, field)
        if theirs != ours and not (field == "target_layers" and not theirs):
            raise ValueError(
                f"--init {str(folder)!r}: that drafter has {field} {theirs}, this one {ours}. Give the same, or leave "
                "--init out."
            )
    weights = load_file(Path(folder) / WEIGHTS)
    own = {name: weight for name, weight in drafter.state_dict().items() if name != CHOSEN_FROM_ROWS}
    if config.target_layers and not other.target_layers:
        nn.init.zeros_(drafter.layers_proj.weight)
        own = {name: weight for name, weight in own.items() if not name.startswith(OF_TARGET_LAYERS)}
    for name, weight in own.items():
        weight.copy_(weights[name])
