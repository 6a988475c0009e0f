"""`fit` from JSONL to a drafter folder, killed, resumed, on two processes, and refused."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

from tests.training.tiny_models import VOCAB, teach, tiny_target
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import check_drafter
from vllm_ctc_spec.target_names import target_names
from vllm_ctc_spec.training import trainer as trainer_module
from vllm_ctc_spec.training.evaluate import TreeChoice, evaluate
from vllm_ctc_spec.training.fit import FitSettings, dry_run, fit
from vllm_ctc_spec.training.loop import Budget, last_complete_checkpoint

PERIOD = 10


@pytest.fixture(scope="module")
def target_path(tmp_path_factory, rows_path, replay_path):
    """It has learnt the text of both files: drafters learn what the target says of a text."""
    folder, target = tmp_path_factory.mktemp("target"), tiny_target(tied=False)
    rows = [json.loads(line) for path in (rows_path, replay_path) for line in Path(path).read_text().splitlines()]
    teach(target, torch.tensor([row["prompt_token_ids"] + row["token_ids"] for row in rows]))
    target.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows_path(tmp_path_factory):
    """Text that counts up and starts again: any drafter can learn it."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt_token_ids": [1], "token_ids": [(i + j) % PERIOD + 2 for j in range(40)]} for i in range(PERIOD)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(steps: int, **options: object) -> FitSettings:
    defaults = {
        "budget": Budget(steps),
        "learning_rate": 1e-2,
        "batch_size": 4,
        "drafter": {"num_frames": 4, "label_length": 4, "condition_rank": 8, "draft_vocab_size": 2 * PERIOD},
    }
    return FitSettings(**defaults | options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text())


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    compute_loss = trainer_module.DrafterTrainer.compute_loss

    def until(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.DrafterTrainer, "compute_loss", until)


def test_fit_learns_and_the_saved_drafter_drafts(target_path, rows_path, tmp_path):
    folder = fit(target_path, rows_path, tmp_path / "drafter", settings(80, log_steps=20))
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]
    config = check_drafter(str(folder))
    assert (config.num_frames, config.targets) == (4, target_names(target_path))
    drafted = set(weights(folder)["draft_vocab"].tolist())
    assert len(drafted) == 2 * PERIOD
    assert drafted >= set(range(2, 2 + PERIOD))
    losses = report(folder)["losses"]
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert sum(report(folder)["time_shares"].values()) == pytest.approx(1)
    prefix = SpecOptions()
    results = evaluate(
        target_path, str(folder), rows_path, trees=(TreeChoice(SpecOptions(tree="chain"), 4), TreeChoice(prefix, 16))
    ).trees
    assert [(result.tree, result.num_nodes) for result in results] == [("chain", 4), ("prefix", 16)]
    assert all(4.5 < result.length <= 5 for result in results)


@pytest.mark.parametrize("killed_at", [2, 4, 5])
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(target_path, rows_path, tmp_path, killed_at):
    """In the middle of an epoch (which has three steps) too, and over several epochs."""
    every_step = {"save_steps": 1, "log_steps": 1}
    whole = fit(target_path, rows_path, tmp_path / "whole", settings(8, **every_step))
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        kill_at(monkeypatch, killed_at)
        fit(target_path, rows_path, tmp_path / "resumed", settings(8, **every_step))
    assert not (tmp_path / "resumed").exists()
    resumed = fit(target_path, rows_path, tmp_path / "resumed", settings(8, **every_step))
    assert report(resumed)["losses"] == report(whole)["losses"]
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, weights(whole)[name]), name


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(target_path, rows_path, tmp_path, monkeypatch):
    whole = fit(target_path, rows_path, tmp_path / "whole", settings(6, save_steps=2))
    save_optimizer = trainer_module.Trainer._save_optimizer_and_scheduler

    def full_at_step_four(self, output_dir):
        if self.state.global_step == 4:
            (Path(output_dir) / "optimizer.pt").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_optimizer(self, output_dir)

    monkeypatch.setattr(trainer_module.Trainer, "_save_optimizer_and_scheduler", full_at_step_four)
    with pytest.raises(OSError, match="No space left"):
        fit(target_path, rows_path, tmp_path / "resumed", settings(6, save_steps=2))
    monkeypatch.undo()
    checkpoints = tmp_path / "resumed.checkpoints"
    assert last_complete_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    resumed = fit(target_path, rows_path, tmp_path / "resumed", settings(6, save_steps=2))
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(resumed).items())


def test_a_run_is_not_resumed_with_other_settings(target_path, rows_path, tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        kill_at(monkeypatch, 1)
        fit(target_path, rows_path, tmp_path / "drafter", settings(4))
    with pytest.raises(ValueError, match=r"drafter.checkpoints.* learning_rate=0.01; this one has 0.02"):
        fit(target_path, rows_path, tmp_path / "drafter", settings(4, learning_rate=2e-2))
    fit(target_path, rows_path, tmp_path / "drafter", settings(4, save_steps=3))


def test_cached_hidden_states_train_the_same_drafter(target_path, rows_path, tmp_path):
    computed = fit(target_path, rows_path, tmp_path / "computed", settings(5))
    cached = fit(target_path, rows_path, tmp_path / "cached", settings(5, cache=tmp_path / "cache"))
    for name, weight in weights(cached).items():
        torch.testing.assert_close(weight, weights(computed)[name], atol=1e-4, rtol=1e-3)


def test_accumulated_small_batches_equal_a_large_one(target_path, rows_path, tmp_path):
    large = fit(target_path, rows_path, tmp_path / "large", settings(2, batch_size=4, log_steps=1))
    accumulated = {"gradient_accumulation_steps": 2}
    small = fit(target_path, rows_path, tmp_path / "small", settings(2, batch_size=2, log_steps=1, trainer=accumulated))
    assert report(small)["losses"] == pytest.approx(report(large)["losses"], rel=2e-2)


def test_anchors_that_no_alignment_fits_are_counted(target_path, tmp_path):
    """Three equal labels need two blanks between them: five frames."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt_token_ids": [1], "token_ids": [7] * 9}) + "\n")
    counts = {}
    for frames in (4, 5):
        fields = {"emission": "independent", "num_frames": frames, "label_length": 3}
        folder = fit(
            target_path, tmp_path / "rows.jsonl", tmp_path / str(frames), settings(5, drafter=fields, log_steps=2)
        )
        counts[frames] = report(folder)["impossible_anchors"]
    assert counts == {4: 5 * 6, 5: 0}


@pytest.mark.slow
def test_two_processes_train_one_drafter(target_path, rows_path, tmp_path):
    """gloo on CPU, as `torchrun` starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "vllm_ctc_spec.cli", "train", "fit", target_path, str(rows_path), str(tmp_path / "drafter")]
    command += ["--steps=100", "--learning-rate=0.01", "--batch-size=2", "--frames=4", "--label-length=4", "--rank=8"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter"]
    assert report(tmp_path / "drafter")["steps"] == 100
    trees = (TreeChoice(SpecOptions(), 16),)
    assert evaluate(target_path, str(tmp_path / "drafter"), rows_path, trees).trees[0].length > 4


def test_a_dry_run_checks_and_writes_a_drafter_without_training(target_path, rows_path, tmp_path):
    folder = dry_run(target_path, rows_path, tmp_path / "drafter", settings(10))
    assert [path.name for path in tmp_path.iterdir()] == ["drafter.dry-run"]
    assert check_drafter(str(folder)).num_frames == 4


@pytest.mark.parametrize("run", [fit, dry_run])
def test_data_without_a_usable_anchor_is_refused(target_path, tmp_path, run):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(ValueError, match=r"no row with 2 trained tokens .* label_length=4"):
        run(target_path, tmp_path / "rows.jsonl", tmp_path / "drafter", settings(1))


@pytest.mark.parametrize("run", [fit, dry_run])
def test_an_unknown_trainer_setting_is_refused_by_name(target_path, rows_path, tmp_path, run):
    with pytest.raises(ValueError, match=r"unknown trainer setting 'gradient_acumulation_steps'\. Did you mean"):
        run(target_path, rows_path, tmp_path / "drafter", settings(1, trainer={"gradient_acumulation_steps": 2}))


@pytest.mark.parametrize("run", [fit, dry_run])
def test_reporting_to_what_is_not_installed_is_refused_by_name(target_path, rows_path, tmp_path, run):
    with pytest.raises(ValueError, match=r"report_to='nowhere': .*not installed"):
        run(target_path, rows_path, tmp_path / "drafter", settings(1, trainer={"report_to": "nowhere"}))


def test_rows_of_messages_are_rendered_with_the_variables_of_the_template(target_path, tmp_path):
    target = shutil.copytree(target_path, tmp_path / "target")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% if style is not defined %}{{ raise_exception('no style') }}{% endif %}"
    template += "{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template).save_pretrained(target)
    text = " ".join(f"w{i}" for i in range(2, 30))
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": text}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match=r"chat template refuses the messages \(no style\)"):
        fit(str(target), tmp_path / "rows.jsonl", tmp_path / "drafter", settings(1))
    chosen = settings(1, chat_template_kwargs={"style": "new"})
    folder = fit(str(target), tmp_path / "rows.jsonl", tmp_path / "drafter", chosen)
    assert json.loads((folder / "settings.json").read_text())["chat_template_kwargs"] == {"style": "new"}


@pytest.mark.parametrize("run", [fit, dry_run])
@pytest.mark.parametrize("name", ["label_decay", "label_temperature"])
@pytest.mark.parametrize(("fields", "given"), [({}, 0.0), ({}, 1.5), ({"emission": "independent"}, 0.8)])
def test_label_options_that_mean_nothing_are_refused(target_path, rows_path, tmp_path, run, name, fields, given):
    chosen = settings(1, **{name: given})
    chosen.drafter.update(fields)
    with pytest.raises(ValueError, match=f"{name}={given}: "):
        run(target_path, rows_path, tmp_path / "drafter", chosen)


def test_too_small_a_disk_is_refused_before_training(target_path, rows_path, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("vllm_ctc_spec.training.fit.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"need .* GB of disk, 0.0 GB are free"):
        fit(target_path, rows_path, tmp_path / "drafter", settings(1))


def test_a_full_gpu_names_the_settings_to_lower(target_path, rows_path, tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(trainer_module.DrafterTrainer, "compute_loss", out_of_memory)
    with pytest.raises(ValueError, match=r"80 GiB.*batch_size=4, anchors_per_row=64 or max_length=512"):
        fit(target_path, rows_path, tmp_path / "drafter", settings(1))


def test_the_first_drafts_are_as_sure_as_the_target(target_path, rows_path, tmp_path):
    """Of one that divides its logits by 30: before anything is learnt, a label costs about what a guess costs."""
    shutil.copytree(target_path, tmp_path / "target")
    config = AutoConfig.from_pretrained(target_path)
    torch.manual_seed(0)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 1.0}
    GraniteForCausalLM(
        GraniteConfig(**sizes, logits_scaling=30.0, bos_token_id=None, eos_token_id=0, pad_token_id=None)
    ).save_pretrained(tmp_path / "target")
    folder = fit(str(tmp_path / "target"), rows_path, tmp_path / "drafter", settings(1, log_steps=1))
    first_loss = report(folder)["losses"][0]
    assert first_loss < 1.3 * settings(1).drafter["num_frames"] * math.log(VOCAB)


def test_a_fit_that_starts_from_another_drafter_knows_what_that_one_knew(target_path, rows_path, tmp_path):
    first = fit(target_path, rows_path, tmp_path / "first", settings(30))
    fresh = fit(target_path, rows_path, tmp_path / "fresh", settings(2, log_steps=1))
    second = fit(target_path, rows_path, tmp_path / "second", settings(2, log_steps=1, init=str(first)))
    assert report(second)["losses"][0] < 0.7 * report(fresh)["losses"][0]
    assert report(second)["before"] == report(first)
    assert "before" not in report(first)


@pytest.fixture(scope="module")
def replay_path(tmp_path_factory):
    """Text that counts down, with other numbers."""
    path = tmp_path_factory.mktemp("replay") / "old.jsonl"
    rows = [{"prompt_token_ids": [1], "token_ids": [30 - (i + j) % PERIOD for j in range(40)]} for i in range(PERIOD)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_replayed_is_not_forgotten(target_path, rows_path, replay_path, tmp_path):
    length, tree = {}, (TreeChoice(SpecOptions(), 8),)
    old = fit(target_path, replay_path, tmp_path / "old", settings(50))
    for name, options in {"alone": {}, "replaying": {"replay": replay_path}}.items():
        adapted = fit(target_path, rows_path, tmp_path / name, settings(50, init=str(old), **options))
        length[name] = [
            evaluate(target_path, str(adapted), rows, tree).trees[0].length for rows in (rows_path, replay_path)
        ]
    assert length["alone"][0] > 4.5 > 2 > length["alone"][1]
    assert min(length["replaying"]) > 4.5


def test_a_killed_run_replays_the_same_rows(target_path, rows_path, replay_path, tmp_path):
    replaying = {"save_steps": 1, "log_steps": 1, "replay": replay_path, "replay_share": 0.5}
    whole = fit(target_path, rows_path, tmp_path / "whole", settings(8, **replaying))
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Killed):
        kill_at(monkeypatch, 6)
        fit(target_path, rows_path, tmp_path / "resumed", settings(8, **replaying))
    with pytest.raises(ValueError, match=r"replay_share=0\.5; this one has 0\.25"):
        fit(target_path, rows_path, tmp_path / "resumed", settings(8, **replaying | {"replay_share": 0.25}))
    resumed = fit(target_path, rows_path, tmp_path / "resumed", settings(8, **replaying))
    assert report(resumed)["losses"] == report(whole)["losses"]
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(resumed).items())


@pytest.mark.parametrize("run", [fit, dry_run])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_share": 0.5}, "replay_share=0.5: there is nothing to replay"),
        ({"replay": "old.jsonl", "replay_share": 1.0}, "replay_share=1.0: use a number above 0 and below 1"),
        ({"replay": "old.jsonl"}, "data file 'old.jsonl' cannot be read"),
    ],
)
def test_a_replay_that_means_nothing_is_refused(target_path, rows_path, tmp_path, run, options, message):
    with pytest.raises(ValueError, match=message):
        run(target_path, rows_path, tmp_path / "drafter", settings(1, **options))


def test_a_drafter_that_is_there_is_taken_for_the_same_run_alone(target_path, rows_path, tmp_path):
    folder = fit(target_path, rows_path, tmp_path / "drafter", settings(2))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert fit(target_path, rows_path, folder, settings(2)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"drafter' holds a run with learning_rate=0.01; this one has 0.02"):
        fit(target_path, rows_path, folder, settings(2, learning_rate=0.02))
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"drafter' is there already.*Name another folder"):
        fit(target_path, rows_path, folder, settings(2))
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
