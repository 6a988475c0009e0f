"""Medusa heads (Cai et al., arXiv 2401.10774) for vLLM's `MedusaModel`.

Head k reads the target's last hidden state before the anchor and predicts the token k + 1 positions after the anchor.

Letters: B rows, L tokens, M anchors, n valid anchors, U labels = heads, H hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from baseline import Baseline, rows_at, save_checkpoint
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from vllm_ctc_spec.training.objective import target_hidden

NUM_HEADS = 5
NUM_LAYERS = 1


class MedusaConfig(PretrainedConfig):
    model_type = "medusa"


class ResidualBlock(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(NUM_LAYERS))
        for layer in self.layers:
            # The head starts as the target's own, as in the paper.
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class Medusa(Baseline):
    num_labels = NUM_HEADS
    batch_size = 2
    learning_rate = 3e-2

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__(target)
        self.blocks = nn.ModuleList(ResidualBlock(self.lm_head.shape[1]) for _ in range(NUM_HEADS))

    def forward(self, input_ids: Tensor, anchors: Tensor, valid: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = rows_at(target_hidden(self.target, input_ids), anchors - 1)[valid]
        # The paper weighs heads by 0.8^k; without a common weight and under Muon a head's scale changes nothing.
        losses = [
            F.cross_entropy(block(hidden) @ self.lm_head.T, wanted)
            for block, wanted in zip(self.blocks, labels[valid].unbind(-1))
        ]
        return {"loss": sum(losses) / NUM_HEADS}

    def save(self, folder: Path) -> None:
        vocab, size = self.lm_head.shape
        config = MedusaConfig(
            architectures=["MedusaModel"], hidden_size=size, vocab_size=vocab, num_heads=NUM_HEADS,
            num_hidden_layers=NUM_LAYERS, medusa_fc_bias=True, original_lm_head=True,
        )  # fmt: skip
        weights = {f"blocks.{name}": weight for name, weight in self.blocks.state_dict().items()}
        save_checkpoint(folder, config, weights | {"lm_head.weight": self.lm_head}, self.target.dtype)
