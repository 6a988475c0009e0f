"""`fit`: train a drafter for a Hugging Face target and write it as a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, Trainer

from vllm_ctc_spec.drafter import CTCDrafter, CTCDrafterConfig
from vllm_ctc_spec.training.atomic import atomic_folder
from vllm_ctc_spec.training.budget import Budget, BudgetCallback
from vllm_ctc_spec.training.data import AnchorCollator, RowDataset, read_rows
from vllm_ctc_spec.training.loop import bf16_is_fast, drop_checkpoints, loop_arguments, train_or_resume
from vllm_ctc_spec.training.objective import DraftObjective
from vllm_ctc_spec.training.optimizer import MuonAdamW


@dataclass(frozen=True)
class FitSettings:
    budget: Budget = field(default_factory=lambda: Budget(max_steps=2000))
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    batch_size: int = 8
    anchors_per_row: int = 16
    max_length: int = 512
    chunk_size: int = 256
    """Anchors whose logits exist at the same time."""
    save_steps: int = 500
    log_steps: int = 100
    seed: int = 0
    drafter: dict[str, Any] = field(default_factory=dict)
    """Fields of CTCDrafterConfig that differ from `drafter_config`'s choice."""


def fit(target_path: str, data: Path, output_dir: Path, settings: FitSettings | None = None) -> Path:
    """Train on the JSONL file `data` and write the drafter to `output_dir`, whole or not at all.

    Checkpoints live in `<output_dir>.checkpoints`; a run that was killed goes on from the last one.
    """
    settings = settings or FitSettings()
    torch.manual_seed(settings.seed)
    target = load_target(target_path)
    config = drafter_config(target.config, **settings.drafter)
    rows = read_rows(data, AutoTokenizer.from_pretrained(target_path), settings.max_length)
    dataset = RowDataset(rows, config.label_length)
    if not len(dataset):
        raise ValueError(
            f"{str(data)!r} has no row with {config.label_length + 1} trained tokens in sequence, as label_length="
            f"{config.label_length} needs. Use longer rows or a smaller label_length."
        )
    checkpoints = output_dir.with_name(f"{output_dir.name}.checkpoints")
    drafter = CTCDrafter(config)
    _train(DraftObjective(drafter, target, settings.chunk_size), dataset, checkpoints, settings)
    with atomic_folder(output_dir) as partial:
        drafter.to(target.dtype).save_pretrained(partial)
    drop_checkpoints(checkpoints)
    return output_dir


def load_target(path: str) -> PreTrainedModel:
    dtype = torch.bfloat16 if bf16_is_fast() else torch.float32
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def drafter_config(target: PretrainedConfig, **overrides: Any) -> CTCDrafterConfig:
    """The drafter that shares the target's embedding, LM head, K/V shape and rotary base.

    `overrides` are fields of CTCDrafterConfig; an unknown one is refused by name.
    """
    text = target.get_text_config()
    heads = text.num_attention_heads
    fields = {
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "intermediate_size": text.intermediate_size,
        "rope_theta": _rope_theta(text),
        "max_position_embeddings": text.max_position_embeddings,
    }
    known = CTCDrafterConfig().to_dict()
    for name in overrides:
        if name not in known:
            raise ValueError(f"unknown drafter setting {name!r}. Settings: {', '.join(sorted(known))}.")
    return CTCDrafterConfig(**fields | overrides)


def _rope_theta(text: PretrainedConfig) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)


class _DrafterTrainer(Trainer):
    """transformers' Trainer whose model is a DraftObjective and whose checkpoints hold the drafter alone."""

    model: DraftObjective

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor:
        return model(**inputs).mean

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.model.drafter.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.drafter.load_state_dict(load_file(Path(resume_from_checkpoint) / "model.safetensors"))


def _train(objective: DraftObjective, dataset: RowDataset, checkpoints: Path, settings: FitSettings) -> None:
    clock = BudgetCallback(settings.budget)
    optimizer = MuonAdamW(objective.drafter, settings.learning_rate, settings.weight_decay)
    arguments = loop_arguments(
        checkpoints, settings.budget, settings.batch_size, settings.save_steps, settings.log_steps, settings.seed
    )
    trainer = _DrafterTrainer(
        objective,
        arguments,
        train_dataset=dataset,
        data_collator=AnchorCollator(settings.anchors_per_row, objective.drafter.config.label_length),
        optimizers=(optimizer, clock.schedule(optimizer)),
        callbacks=[clock],
    )
    train_or_resume(trainer)
