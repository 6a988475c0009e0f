"""`fit`: train a drafter for a Hugging Face target and write it as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback

from vllm_ctc_spec.drafter import CTCDrafter, CTCDrafterConfig
from vllm_ctc_spec.files import atomic_folder, claim, is_finished, write_atomically
from vllm_ctc_spec.machine import target_dtype
from vllm_ctc_spec.target_names import target_names
from vllm_ctc_spec.training.calibrate import calibrate, split_rows
from vllm_ctc_spec.training.card import training_facts, training_record
from vllm_ctc_spec.training.data import (
    AnchorDataset,
    SimilarRows,
    TrainingRow,
    collate_anchors,
    most_frequent,
    num_frequent,
    read_rows,
    with_anchors,
)
from vllm_ctc_spec.training.hidden_cache import HiddenCache, write_cache
from vllm_ctc_spec.training.loop import (
    Budget,
    BudgetCallback,
    MuonAdamW,
    StepTimes,
    drop_checkpoints,
    loop_arguments,
    processes,
    report,
    train_or_resume,
)
from vllm_ctc_spec.training.models import check_target, drafter_config, load_target, start_from
from vllm_ctc_spec.training.objective import DraftObjective

DRY_RUN_LINES = 1000
LABEL_DECAY = 0.8
"""Between 1 and 0.65, which accept less or no more (benchmarks/README.md)."""
NOT_RESUMED = ("save_steps", "log_steps", "trust_remote_code")
"""Settings that a resumed run may change."""


@dataclass(frozen=True)
class FitSettings:
    budget: Budget = field(default_factory=lambda: Budget(max_steps=4000))
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    batch_size: int = 4
    """Rows per device and step."""
    anchors_per_row: int = 64
    max_length: int = 512
    """Tokens; longer rows are cut."""
    label_decay: float | None = None
    """Weight of each label over that of the one before it: a label counts only where those before it are accepted.
    None for LABEL_DECAY where each label has a frame of its own; a sum over alignments has no weights.
    """
    save_steps: int = 500
    log_steps: int = 100
    seed: int = 0
    cache: Path | None = None
    """Folder for the target's hidden states: worth its disk where rows are seen more than once."""
    init: str | None = None
    """Folder of a drafter whose weights are the first."""
    trust_remote_code: bool = False
    """Run the code that the target's folder or repository brings."""
    drafter: dict[str, Any] = field(default_factory=dict)
    """Fields of CTCDrafterConfig that differ from `drafter_config`'s choice."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers.TrainingArguments, such as gradient_accumulation_steps or report_to."""


def fit(
    target_path: str,
    data: str | Path,
    output_dir: Path,
    settings: FitSettings | None = None,
    skipped: list[str] | None = None,
) -> Path:
    """Train on the rows of `data` and write the drafter to `output_dir`, whole or not at all.

    Checkpoints live in `<output_dir>.checkpoints`; a run that was killed goes on from the last whole one. `data` and
    `skipped` are those of `read_rows`. Started by torchrun or accelerate, all processes share the work.
    """
    settings = settings or FitSettings()
    resumable = _resumable(target_path, data, settings)
    if is_finished(output_dir, resumable):
        return output_dir
    config = drafter_config(_target_config(target_path, settings), **settings.drafter)
    label_decay = _label_decay(settings, config)
    rows = _usable_rows(target_path, data, config, settings, skipped)
    checkpoints = output_dir.with_name(f"{output_dir.name}.checkpoints")
    with processes().main_process_first():
        claim(checkpoints, resumable)
    torch.manual_seed(settings.seed)
    drafter = _first_drafter(config, settings)
    _check_disk(output_dir, drafter)
    target = load_target(target_path, settings.trust_remote_code)
    rows, calibration_rows = split_rows(rows)
    hidden = _cached_hidden(settings.cache, target, target_path, rows, config.target_layers)
    dataset = AnchorDataset(
        rows, config.label_length, settings.anchors_per_row, settings.seed, hidden, _least_labels(config)
    )
    if config.draft_vocab_size is not None:
        drafter.draft_only(most_frequent(rows, config.vocab_size, config.draft_vocab_size))
    objective = DraftObjective(drafter, target, _frequent(rows, config), label_decay)
    try:
        training = _train(objective, dataset, checkpoints, settings)
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU's memory is full ({error}). Lower batch_size={settings.batch_size}, "
            f"anchors_per_row={settings.anchors_per_row} or max_length={settings.max_length}; "
            "gradient_accumulation_steps makes up for a smaller batch."
        ) from error
    if processes().is_main_process:
        training["calibration_factor"] = calibrate(objective, calibration_rows, settings.seed)
        training |= training_facts(rows)
        if settings.init is not None:
            training["before"] = training_record(Path(settings.init))
        drafter.config.targets = target_names(target_path)
        with atomic_folder(output_dir) as partial:
            drafter.to("cpu", target.dtype).save_pretrained(partial)
            write_atomically(partial / "training.json", json.dumps(training, indent=2).encode())
            claim(partial, resumable)
        drop_checkpoints(checkpoints)
    processes().wait_for_everyone()
    return output_dir


def dry_run(
    target_path: str,
    data: str | Path | None,
    output_dir: Path,
    settings: FitSettings | None = None,
    skipped: list[str] | None = None,
) -> Path:
    """Check what `fit` would need and write an untrained drafter, which serves, to `<output_dir>.dry-run`.

    Reads the first DRY_RUN_LINES lines of `data` only, if there is any yet, and does not load the target's weights.
    """
    settings = settings or FitSettings()
    config = drafter_config(_target_config(target_path, settings), **settings.drafter)
    _label_decay(settings, config)
    check_target(target_path, settings.trust_remote_code)
    if data is not None:
        _usable_rows(target_path, data, config, settings, skipped, DRY_RUN_LINES)
    drafter = _first_drafter(config, settings)
    _check_disk(output_dir, drafter)
    loop_arguments(output_dir, settings.budget, settings.batch_size, **settings.trainer)
    untrained = output_dir.with_name(f"{output_dir.name}.dry-run")
    with atomic_folder(untrained) as partial:
        drafter.to(target_dtype()).save_pretrained(partial)
    return untrained


def _target_config(target_path: str, settings: FitSettings) -> PretrainedConfig:
    return AutoConfig.from_pretrained(target_path, trust_remote_code=settings.trust_remote_code)


def _first_drafter(config: CTCDrafterConfig, settings: FitSettings) -> CTCDrafter:
    drafter = CTCDrafter(config)
    if settings.init is not None:
        start_from(drafter, settings.init)
    return drafter


def _usable_rows(
    target_path: str,
    data: str | Path,
    config: CTCDrafterConfig,
    settings: FitSettings,
    skipped: list[str] | None,
    max_lines: int | None = None,
) -> list[TrainingRow]:
    tokenizer = AutoTokenizer.from_pretrained(target_path, trust_remote_code=settings.trust_remote_code)
    rows = read_rows(data, tokenizer, settings.max_length, skipped, vocab_size=config.vocab_size, max_lines=max_lines)
    least_labels = _least_labels(config)
    usable = with_anchors(rows, least_labels)
    if not usable:
        raise ValueError(
            f"{str(data)!r} has no row with {least_labels + 1} trained tokens in sequence, as label_length="
            f"{config.label_length} needs. Use longer rows or a smaller label_length."
        )
    return usable


def _least_labels(config: CTCDrafterConfig) -> int:
    """Of an anchor: at the end of an answer there are fewer than U, which a sum over alignments cannot leave out."""
    return config.label_length if config.has_blank else 1


def _frequent(rows: Sequence[TrainingRow], config: CTCDrafterConfig) -> Tensor | None:
    """Tokens that stand for the vocabulary in the loss, together with as many drawn at random.

    Per step the loss falls as with all V, and a step takes less time.
    """
    num_sampled = num_frequent(config.vocab_size)
    return None if num_sampled is None else most_frequent(rows, config.vocab_size, num_sampled // 2)


def _label_decay(settings: FitSettings, config: CTCDrafterConfig) -> float:
    given = settings.label_decay
    if config.has_blank:
        if given is not None:
            raise ValueError(
                f"label_decay={given}: this drafter learns from a sum over alignments, which has no weights for single "
                f"labels. Leave it out, or train with label_length={config.num_frames} and conditioned emissions."
            )
        return 1.0
    if given is not None and not 0 < given <= 1:
        raise ValueError(f"label_decay={given}: use a number above 0, up to 1 for labels of one weight.")
    return LABEL_DECAY if given is None else given


def _resumable(target_path: str, data: str | Path, settings: FitSettings) -> dict[str, Any]:
    """What must not change between a killed run and the one that goes on, as JSON values."""
    fields = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_RESUMED}
    flat = {"target": str(target_path), "data": str(data), **fields}
    return json.loads(json.dumps(flat, default=str))


def _check_disk(output_dir: Path, drafter: CTCDrafter) -> None:
    # Weights and two moments in float32, in two whole checkpoints and the one that is being written.
    needed = 3 * 3 * 4 * sum(weight.numel() for weight in drafter.parameters())
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir.parent).free
    if free < needed:
        raise ValueError(
            f"checkpoints in {str(output_dir.parent)!r} need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are "
            "free. Make room or choose another output folder."
        )


def _cached_hidden(
    cache: Path | None, target: PreTrainedModel, target_path: str, rows: Sequence[TrainingRow], layers: Sequence[int]
) -> Callable[[int], Tensor] | None:
    if cache is None:
        return None
    if processes().is_main_process:
        target.to(processes().device)
        write_cache(cache, target, target_path, rows, layers)
    processes().wait_for_everyone()
    return HiddenCache(cache, target_path, rows, target.dtype, layers).__getitem__


class _DrafterTrainer(Trainer):
    """transformers' Trainer whose model is a DraftObjective and whose checkpoints hold the drafter alone."""

    model: DraftObjective
    num_impossible = 0
    """Anchors whose labels no alignment fits, since the last log."""

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


class _TellEpoch(TrainerCallback):
    """Trainer tells its sampler the epoch, not the data set, which draws other anchors in each."""

    def __init__(self, dataset: AnchorDataset) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._dataset.epoch = int(state.epoch)


def _train(
    objective: DraftObjective, dataset: AnchorDataset, checkpoints: Path, settings: FitSettings
) -> dict[str, Any]:
    """Returns the run's report, as JSON values."""
    clock, times = BudgetCallback(settings.budget), StepTimes()
    optimizer = MuonAdamW(objective.drafter, settings.learning_rate, settings.weight_decay)
    options = {"save_steps": settings.save_steps, "logging_steps": settings.log_steps, "seed": settings.seed}
    trainer = _DrafterTrainer(
        objective,
        loop_arguments(checkpoints, settings.budget, settings.batch_size, **options | settings.trainer),
        train_dataset=dataset,
        data_collator=collate_anchors,
        optimizers=(optimizer, clock.schedule(optimizer)),
        callbacks=[clock, times, _TellEpoch(dataset)],
    )
    train_or_resume(trainer, clock)
    num_impossible = sum(entry.get("impossible_anchors", 0) for entry in trainer.state.log_history)
    return {**report(trainer, clock, times), "impossible_anchors": num_impossible}
