"""transformers' Trainer for a drafter: it trains a DraftObjective, and its checkpoints hold only the drafter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from vllm_ctc_spec.training.data import AnchorDataset, SimilarRows, collate_anchors
from vllm_ctc_spec.training.loop import (
    Budget,
    BudgetCallback,
    MuonAdamW,
    StepTimes,
    loop_arguments,
    report,
    train_or_resume,
)
from vllm_ctc_spec.training.objective import DraftObjective


class DrafterTrainer(Trainer):
    model: DraftObjective
    num_impossible = 0
    """Anchors without any alignment since the last log."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return SimilarRows(dataset, self.args.train_batch_size)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor:
        loss = model(**inputs)
        self.num_impossible = self.num_impossible + loss.num_impossible
        return loss.mean

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.drafter.config.emission == "independent":
            logs["impossible_anchors"], self.num_impossible = int(self.num_impossible), 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.model.drafter.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.drafter.load_state_dict(load_file(Path(resume_from_checkpoint) / "model.safetensors"))


class SetEpoch(TrainerCallback):
    """Sets the epoch of the data set, which draws other anchors in each. Trainer sets only the sampler's."""

    def __init__(self, dataset: AnchorDataset) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._dataset.epoch = int(state.epoch)


def train(
    objective: DraftObjective,
    dataset: AnchorDataset,
    checkpoints: Path,
    budget: Budget,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Train until `budget` is spent, and return the run's report as JSON values.

    options: further fields of transformers.TrainingArguments.
    """
    clock, times = BudgetCallback(budget), StepTimes()
    optimizer = MuonAdamW(objective.drafter, learning_rate, weight_decay)
    trainer = DrafterTrainer(
        objective,
        loop_arguments(checkpoints, budget, batch_size, **options),
        train_dataset=dataset,
        data_collator=collate_anchors,
        optimizers=(optimizer, clock.schedule(optimizer)),
        callbacks=[clock, times, SetEpoch(dataset)],
    )
    train_or_resume(trainer, clock)
    num_impossible = sum(entry.get("impossible_anchors", 0) for entry in trainer.state.log_history)
    return {**report(trainer, clock, times), "impossible_anchors": num_impossible}
