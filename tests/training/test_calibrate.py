"""One factor on all logits makes the expected accepted length equal to the measured one."""

import copy
import dataclasses

import pytest
import torch

from tests.training.tiny_models import VOCAB, teach, tiny_drafter, tiny_target
from vllm_ctc_spec.drafter.drafting import emission_logits, set_tables_from
from vllm_ctc_spec.training import calibrate as calibrate_module
from vllm_ctc_spec.training.calibrate import RowSplit, calibrate, scale_logits, split_rows
from vllm_ctc_spec.training.data import AnchorDataset, TrainingRow, collate_anchors
from vllm_ctc_spec.training.objective import DraftObjective


@pytest.mark.parametrize(("emission", "label_length"), [("conditioned", 4), ("conditioned", 3), ("independent", 3)])
def test_scaling_multiplies_every_logit(emission, label_length):
    drafter = tiny_drafter(tiny_target(), emission=emission, label_length=label_length)
    if drafter.config.has_blank:
        drafter.blank_bias.data.fill_(0.7)
    scaled = copy.deepcopy(drafter)
    scale_logits(scaled, 1.5)
    x, lm_head = torch.randn(2, 4, 32), torch.nn.Linear(32, VOCAB, bias=False)
    logits = emission_logits(drafter, drafter.norm(x), lm_head)
    torch.testing.assert_close(emission_logits(scaled, scaled.norm(x), lm_head), 1.5 * logits)
    if emission == "conditioned":
        embeddings = torch.randn(2, 32)
        torch.testing.assert_close(scaled.condition_last(embeddings), 1.5 * drafter.condition_last(embeddings))
        torch.testing.assert_close(scaled.next_rows(lm_head.weight), drafter.next_rows(lm_head.weight))
        torch.testing.assert_close(scaled.condition_gate(scaled.norm(x)), drafter.condition_gate(drafter.norm(x)))


@pytest.mark.parametrize("emission", ["conditioned", "independent"])
def test_the_expected_accepted_length_is_the_measured_one_on_the_calibration_rows(emission):
    target, rows = tiny_target(), noisy_counting_rows(40)
    teach(target, torch.stack([row.token_ids for row in rows]))
    objective = DraftObjective(tiny_drafter(target, emission=emission, label_length=4), target)
    train(objective, rows)
    expected, accepted = expected_and_accepted(objective, rows)
    assert expected < 0.9 * accepted
    calibrate(objective, rows)
    expected, accepted = expected_and_accepted(objective, rows)
    assert expected == pytest.approx(accepted, rel=0.03)


def noisy_counting_rows(count: int) -> list[TrainingRow]:
    """Rows that count up, with one random token in four, so that no next token is certain."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for start in range(count):
        counted = (start + torch.arange(24)) % 20
        noise = torch.rand(24, generator=generator) < 0.25
        text = counted.where(~noise, torch.randint(VOCAB, (24,), generator=generator))
        rows.append(TrainingRow(text, torch.ones(24, dtype=torch.bool)))
    return rows


def train(objective: DraftObjective, rows: list[TrainingRow]) -> None:
    labels = objective.drafter.config.label_length
    dataset = AnchorDataset(rows, labels, anchors_per_row=16)
    batch = collate_anchors([dataset[index] for index in range(len(dataset))])
    optimizer = torch.optim.AdamW(objective.drafter.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        objective(**batch).mean.backward()
        optimizer.step()


def expected_and_accepted(objective: DraftObjective, rows: list[TrainingRow]) -> tuple[float, float]:
    objective.eval()
    set_tables_from(objective.drafter, objective.target)
    return calibrate_module.expected_and_accepted(objective, calibrate_module._draft(objective, rows, 0), 1.0)


def test_rows_to_calibrate_on_are_not_trained_on():
    rows = noisy_counting_rows(100)
    split = split_rows(rows)
    assert (len(split.trained), len(split.calibration)) == (95, 5)
    assert not {id(row) for row in split.trained} & {id(row) for row in split.calibration}
    assert len(split_rows(rows, share=2, max_calibration=10).calibration) == 10
    assert split_rows(rows[:10]) == RowSplit(rows[:10], [])


def test_rows_of_a_calibration_rows_prompt_are_not_trained_on():
    def row(prompt: int, answer: int) -> TrainingRow:
        return TrainingRow(torch.tensor([prompt, prompt + 1, answer]), torch.tensor([False, False, True]))

    split = split_rows([row(prompt, answer) for answer in range(3) for prompt in range(40)])
    assert (len(split.trained), len(split.calibration)) == (3 * 38, 2)
    trained, kept = ({int(row.token_ids[0]) for row in rows} for rows in (split.trained, split.calibration))
    assert not trained & kept


def test_rows_that_are_replayed_are_not_calibrated_on():
    new = noisy_counting_rows(40)
    replayed = [dataclasses.replace(row, is_replay=True) for row in noisy_counting_rows(100)]
    split = split_rows(new + replayed)
    assert [id(row) for row in split.calibration] == [id(new[19]), id(new[39])]
    assert len(split.trained) == 138
