"""Base class of the baselines: a module that returns its loss and writes a checkpoint for vLLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class Baseline(nn.Module, ABC):
    """A drafter that is trained, with the frozen target.

    Batches are those of `collate_anchors`: anchors are trained positions, labels the tokens after them. An anchor is
    the last token that the target has produced; hidden states exist up to the position before it.
    """

    num_labels: int
    """Tokens after an anchor that the loss reads."""
    batch_size: int
    """Rows per step."""
    learning_rate: float
    """Peak learning rate of `MuonAdamW`."""

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__()
        self.target = target.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Baseline:
        super().train(mode)
        self.target.eval()
        return self

    @property
    def lm_head(self) -> Tensor:
        """[V, H], the target's."""
        return self.target.get_output_embeddings().weight

    @abstractmethod
    def forward(self, input_ids: Tensor, anchors: Tensor, valid: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`: [] float32. input_ids: [B, L]; anchors, valid: [B, M]; labels: [B, M, U]."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a checkpoint for `vllm.LLM(speculative_config={"model": folder})`."""


def save_checkpoint(folder: Path, config: PretrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    config.dtype = dtype
    config.save_pretrained(folder)
    contents = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    save_file(contents, folder / "model.safetensors", metadata={"format": "pt"})


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """[B, M, H], rows of x [B, L, H] at positions [B, M]; positions of padding may be beyond the end."""
    return x.gather(1, positions.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[-1]))
