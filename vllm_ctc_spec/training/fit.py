"""`fit` trains a drafter for a Hugging Face target and writes it as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from vllm_ctc_spec.drafter import CTCDrafter, CTCDrafterConfig
from vllm_ctc_spec.files import atomic_folder, claim, is_finished, write_atomically
from vllm_ctc_spec.machine import target_dtype
from vllm_ctc_spec.target_names import target_names
from vllm_ctc_spec.training.calibrate import RowSplit, calibrate, split_rows
from vllm_ctc_spec.training.card import TRAINING_RECORD, training_facts, training_record
from vllm_ctc_spec.training.data import (
    AnchorDataset,
    TrainingRow,
    most_frequent,
    read_rows,
    with_anchors,
)
from vllm_ctc_spec.training.hidden_cache import HiddenCache, write_cache
from vllm_ctc_spec.training.hidden_sources import FromEngine, HiddenSource, InProcess, check_engine, numbers_of
from vllm_ctc_spec.training.loop import Budget, drop_checkpoints, loop_arguments, processes
from vllm_ctc_spec.training.models import (
    check_target,
    drafter_config,
    load_target,
    load_without_layers,
    start_from,
    start_like,
)
from vllm_ctc_spec.training.objective import DraftObjective
from vllm_ctc_spec.training.trainer import train

DRY_RUN_LINES = 1000
"""Lines of the data that a dry run reads."""
LABEL_DECAY, LABEL_TEMPERATURE = 0.8, 0.5
"""Defaults of `label_decay` and `label_temperature`; others gave lower acceptance lengths (benchmarks/README.md)."""
NUM_SAMPLED = 2048
"""Of the tokens that enter the estimated normaliser: the most frequent ones, and as many drawn at random."""
REPLAY_SHARE = 0.25
"""Default of `replay_share`."""
MAY_CHANGE = ("save_steps", "log_steps", "trust_remote_code", "hidden_from_engine")
"""Settings that may differ between a killed run and the one that resumes it."""


@dataclass(frozen=True)
class FitSettings:
    budget: Budget = field(default_factory=lambda: Budget(max_steps=4000))
    learning_rate: float = 5e-3
    """Peak of the schedule."""
    weight_decay: float = 0.01
    batch_size: int = 4
    """Rows per device and step."""
    anchors_per_row: int = 64
    """Anchors drawn from each row in each epoch."""
    max_length: int = 512
    """Tokens of a row; longer rows are cut."""
    label_decay: float | None = None
    """Weight of a label over the one before it. Below 1, because a token counts only if all before it are accepted.
    None: LABEL_DECAY. Drafters with a blank learn sums over alignments, without weights of single labels."""
    label_temperature: float | None = None
    """Temperature of the target's distribution that the drafter learns: 1 is what serving at temperature 1 draws from,
    towards 0 it is the greedy token. None: LABEL_TEMPERATURE. Drafters with a blank learn the tokens of the text."""
    save_steps: int = 500
    """Steps between checkpoints."""
    log_steps: int = 100
    """Steps between logged losses."""
    seed: int = 0
    cache: Path | None = None
    """Folder for the target's hidden states. It saves time if the run sees its rows more than once."""
    hidden_from_engine: dict[str, Any] | None = None
    """Options of `vllm.LLM` (JSON values) for an engine that computes what `cache` keeps; None: this process does."""
    init: str | None = None
    """Folder of a drafter to start from."""
    replay: str | None = None
    """Rows of earlier text, as `data`, so that a drafter that learns new text does not forget what it knew."""
    replay_share: float | None = None
    """Of the rows that are trained, those of `replay`. None: REPLAY_SHARE."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template, for rows of `messages`."""
    trust_remote_code: bool = False
    """Run the code that the target's folder or repository brings."""
    drafter: dict[str, Any] = field(default_factory=dict)
    """Fields of CTCDrafterConfig that differ from the choice of `drafter_config`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers.TrainingArguments, such as gradient_accumulation_steps or report_to."""


def fit(
    target_path: str,
    data: str | Path,
    output_dir: Path,
    settings: FitSettings | None = None,
    skipped: list[str] | None = None,
) -> Path:
    """Train on the rows of `data`, write the drafter to `output_dir`, whole or not at all, and return `output_dir`.

    Checkpoints are in `<output_dir>.checkpoints` until then; a run that was killed resumes from the last whole one.
    data, skipped: see `read_rows`. Processes started by torchrun or accelerate share the work. Raises ValueError if
    settings, target or data cannot be used, or if `output_dir` holds something else.
    """
    settings = settings or FitSettings()
    resumable = _resumable(target_path, data, settings)
    if is_finished(output_dir, resumable):
        return output_dir
    config = _drafter_config(target_path, settings)
    (label_decay, label_temperature), replay_share = _label_options(settings, config), _replay_share(settings)
    rows = _usable_rows(target_path, data, config, settings, skipped)
    checkpoints = output_dir.with_name(f"{output_dir.name}.checkpoints")
    with processes().main_process_first():
        claim(checkpoints, resumable)
    torch.manual_seed(settings.seed)
    drafter = _first_drafter(config, settings)
    _check_disk(output_dir, drafter)
    load = load_target if settings.hidden_from_engine is None else load_without_layers
    target = load(target_path, settings.trust_remote_code)
    if settings.init is None:
        start_like(drafter, target)
    split = split_rows(rows)
    hidden, calibration_hidden = _cached_hidden(settings, target, target_path, split, config.target_layers)
    dataset = AnchorDataset(
        split.trained,
        config.label_length,
        settings.anchors_per_row,
        settings.seed,
        hidden,
        _min_labels(config),
        replay_share,
    )
    if config.draft_vocab_size is not None:
        drafter.draft_only(
            most_frequent(split.trained, config.vocab_size, config.draft_vocab_size, drafter.draft_vocab)
        )
    objective = DraftObjective(drafter, target, _frequent(split.trained, config), label_decay, label_temperature)
    training = _train(objective, dataset, checkpoints, settings)
    if processes().is_main_process:
        training["calibration_factor"] = calibrate(objective, split.calibration, settings.seed, calibration_hidden)
        training |= training_facts(split.trained)
        if settings.init is not None:
            training["before"] = training_record(Path(settings.init))
        drafter.config.targets = target_names(target_path)
        with atomic_folder(output_dir) as partial:
            drafter.to("cpu", target.dtype).save_pretrained(partial)
            write_atomically(partial / TRAINING_RECORD, json.dumps(training, indent=2).encode())
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
    """Check everything that `fit` needs, and write an untrained drafter that vLLM can serve to `<output_dir>.dry-run`.

    Returns that folder. Reads the first DRY_RUN_LINES lines of `data` (None: no rows yet), and no weights of the
    target. Raises ValueError as `fit` does.
    """
    settings = settings or FitSettings()
    config = _drafter_config(target_path, settings)
    _label_options(settings, config)
    _replay_share(settings)
    check_target(target_path, settings.trust_remote_code)
    _usable_rows(target_path, data, config, settings, skipped, DRY_RUN_LINES)
    drafter = _first_drafter(config, settings)
    _check_disk(output_dir, drafter)
    loop_arguments(output_dir, settings.budget, settings.batch_size, **settings.trainer)
    untrained = output_dir.with_name(f"{output_dir.name}.dry-run")
    with atomic_folder(untrained) as partial:
        drafter.to(target_dtype()).save_pretrained(partial)
    return untrained


def _first_drafter(config: CTCDrafterConfig, settings: FitSettings) -> CTCDrafter:
    drafter = CTCDrafter(config)
    if settings.init is not None:
        start_from(drafter, settings.init)
    return drafter


def _drafter_config(target_path: str, settings: FitSettings) -> CTCDrafterConfig:
    """Raises ValueError for settings that do not fit the target."""
    target = AutoConfig.from_pretrained(target_path, trust_remote_code=settings.trust_remote_code)
    config = drafter_config(target, **settings.drafter)
    if settings.hidden_from_engine is not None:
        check_engine(settings.hidden_from_engine, settings.cache, target, config.target_layers)
    return config


def _replay_share(settings: FitSettings) -> float:
    """0 where nothing is replayed. Raises ValueError for a share that means nothing."""
    given = settings.replay_share
    if given is not None and settings.replay is None:
        raise ValueError(f"replay_share={given}: there is nothing to replay. Name rows with replay, or leave it out.")
    if given is not None and not 0 < given < 1:
        raise ValueError(f"replay_share={given}: use a number above 0 and below 1.")
    if settings.replay is None:
        return 0.0
    return REPLAY_SHARE if given is None else given


def _usable_rows(
    target_path: str,
    data: str | Path | None,
    config: CTCDrafterConfig,
    settings: FitSettings,
    skipped: list[str] | None,
    max_lines: int | None = None,
) -> list[TrainingRow]:
    """The rows of `data`, if there is any yet, then those that are replayed."""
    tokenizer = AutoTokenizer.from_pretrained(target_path, trust_remote_code=settings.trust_remote_code)
    min_labels = _min_labels(config)
    rows: list[TrainingRow] = []
    for source, is_replay in ((data, False), (settings.replay, True)):
        if source is None:
            continue
        read = read_rows(
            source,
            tokenizer,
            settings.max_length,
            skipped,
            vocab_size=config.vocab_size,
            max_lines=max_lines,
            chat_template_kwargs=settings.chat_template_kwargs,
        )
        usable = with_anchors(read, min_labels)
        if not usable:
            raise ValueError(
                f"{str(source)!r} has no row with {min_labels + 1} trained tokens in sequence, as label_length="
                f"{config.label_length} needs. Use longer rows or a smaller label_length."
            )
        rows += [dataclasses.replace(row, is_replay=is_replay) for row in usable]
    return rows


def _min_labels(config: CTCDrafterConfig) -> int:
    """Fewest labels of an anchor. Anchors near the end of an answer have fewer than U, but a sum over alignments needs
    all of them."""
    return config.label_length if config.has_blank else 1


def _frequent(rows: Sequence[TrainingRow], config: CTCDrafterConfig) -> Tensor | None:
    """Tokens for `sampled_softmax`; None for the exact normaliser, with a small vocabulary."""
    is_small = config.vocab_size <= 4 * NUM_SAMPLED
    return None if is_small else most_frequent(rows, config.vocab_size, NUM_SAMPLED)


def _label_options(settings: FitSettings, config: CTCDrafterConfig) -> tuple[float, float]:
    """`label_decay` and `label_temperature`. Raises ValueError for values that mean nothing."""
    options = {"label_decay": LABEL_DECAY, "label_temperature": LABEL_TEMPERATURE}
    for name in options:
        given = getattr(settings, name)
        if given is None:
            continue
        if config.has_blank:
            raise ValueError(
                f"{name}={given}: this drafter learns from a sum over alignments, which has neither weights nor "
                f"distributions of single labels. Leave it out, or train with label_length={config.num_frames} and "
                "conditioned emissions."
            )
        if not 0 < given <= 1:
            raise ValueError(f"{name}={given}: use a number above 0, up to 1.")
        options[name] = given
    return options["label_decay"], options["label_temperature"]


def _resumable(target_path: str, data: str | Path, settings: FitSettings) -> dict[str, Any]:
    """Settings that a resumed run must share with the killed one, as JSON values."""
    fields = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_CHANGE}
    if settings.hidden_from_engine is not None:
        fields["hidden_from_engine"] = numbers_of(settings.hidden_from_engine)
    flat = {"target": str(target_path), "data": str(data), **fields}
    return json.loads(json.dumps(flat, default=str))


def _check_disk(output_dir: Path, drafter: CTCDrafter) -> None:
    # Weights and two moments in float32, in three checkpoints: two complete ones and one that is being written.
    needed = 3 * 3 * 4 * sum(weight.numel() for weight in drafter.parameters())
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir.parent).free
    if free < needed:
        raise ValueError(
            f"checkpoints in {str(output_dir.parent)!r} need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are "
            "free. Make room or choose another output folder."
        )


def _cached_hidden(
    settings: FitSettings, target: PreTrainedModel, target_path: str, split: RowSplit, layers: Sequence[int]
) -> tuple[Callable[[int], Tensor] | None, Callable[[int], Tensor] | None]:
    """Hidden states of rows to train on, and of rows to calibrate on; None if `target` is to compute them."""
    if settings.cache is None:
        return None, None
    engine, rows = settings.hidden_from_engine, split.trained
    source: HiddenSource = InProcess(target)
    if engine is not None:
        source = FromEngine(target, target_path, engine, settings.trust_remote_code)
        rows = split.trained + split.calibration
    if processes().is_main_process:
        target.to(processes().device)
        write_cache(settings.cache, source, target_path, rows, layers)
    processes().wait_for_everyone()
    cached = HiddenCache(settings.cache, target_path, rows, target.dtype, layers, source.engine)
    return cached.__getitem__, None if engine is None else lambda row: cached[len(split.trained) + row]


def _train(
    objective: DraftObjective, dataset: AnchorDataset, checkpoints: Path, settings: FitSettings
) -> dict[str, Any]:
    options = {"save_steps": settings.save_steps, "logging_steps": settings.log_steps, "seed": settings.seed}
    try:
        return train(
            objective,
            dataset,
            checkpoints,
            settings.budget,
            settings.learning_rate,
            settings.weight_decay,
            settings.batch_size,
            options | settings.trainer,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU's memory is full ({error}). Lower batch_size={settings.batch_size}, "
            f"anchors_per_row={settings.anchors_per_row} or max_length={settings.max_length}; "
            "gradient_accumulation_steps makes up for a smaller batch."
        ) from error
