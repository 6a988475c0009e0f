"""`fit` from JSONL to a drafter folder, and the drafter's shape from the target's config."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, PreTrainedTokenizerFast

from tests.training.tiny_models import VOCAB, tiny_target
from vllm_ctc_spec.drafter.checkpoint import check_drafter
from vllm_ctc_spec.training import trainer as trainer_module
from vllm_ctc_spec.training.budget import Budget
from vllm_ctc_spec.training.evaluate import evaluate
from vllm_ctc_spec.training.trainer import FitSettings, drafter_config, fit

PERIOD = 10


@pytest.fixture(scope="module")
def target_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tiny_target(tied=False).save_pretrained(folder)
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
    fields = {"num_frames": 4, "label_length": 4, "condition_rank": 8}
    return FitSettings(budget=Budget(steps), learning_rate=1e-2, drafter=fields, batch_size=4, **options)


def test_fit_learns_and_the_saved_drafter_drafts(target_path, rows_path, tmp_path):
    folder = fit(target_path, rows_path, tmp_path / "drafter", settings(80))
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]
    assert check_drafter(str(folder)).num_frames == 4
    results = evaluate(target_path, str(folder), rows_path, budgets=(4, 16))
    assert [(result.tree, result.num_nodes) for result in results] == [("chain", 4), ("prefix", 4), ("prefix", 16)]
    assert all(4.5 < result.length <= 5 for result in results)
    assert all(result.expected <= 5 + 1e-4 for result in results)


def test_a_killed_run_goes_on_to_the_same_drafter(target_path, rows_path, tmp_path, monkeypatch):
    whole = fit(target_path, rows_path, tmp_path / "whole", settings(6, save_steps=3))

    class Killed(Exception):
        pass

    compute_loss = trainer_module._DrafterTrainer.compute_loss

    def until_step_four(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Killed
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module._DrafterTrainer, "compute_loss", until_step_four)
    with pytest.raises(Killed):
        fit(target_path, rows_path, tmp_path / "resumed", settings(6, save_steps=3))
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(trainer_module._DrafterTrainer, "compute_loss", compute_loss)
    resumed = fit(target_path, rows_path, tmp_path / "resumed", settings(6, save_steps=3))
    expected = AutoModel.from_pretrained(whole).state_dict()
    for name, weight in AutoModel.from_pretrained(resumed).state_dict().items():
        torch.testing.assert_close(weight, expected[name])


def test_data_without_a_usable_anchor_is_refused(target_path, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    with pytest.raises(ValueError, match=r"no row with 5 trained tokens .* label_length=4"):
        fit(target_path, tmp_path / "rows.jsonl", tmp_path / "drafter", settings(1))


def test_the_drafter_has_the_targets_shapes():
    config = drafter_config(tiny_target().config, num_frames=9)
    assert (config.hidden_size, config.vocab_size, config.num_key_value_heads, config.head_dim) == (32, VOCAB, 2, 16)
    assert (config.rope_theta, config.max_position_embeddings, config.num_frames) == (5000.0, 128, 9)


def test_an_unknown_drafter_setting_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown drafter setting 'frames'"):
        drafter_config(tiny_target().config, frames=5)
