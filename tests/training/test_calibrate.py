"""One factor on all logits makes belief equal to acceptance."""

import copy

import pytest
import torch

from tests.training.tiny_models import VOCAB, tiny_drafter, tiny_target
from vllm_ctc_spec.drafter.drafting import emission_logits, set_tables_from
from vllm_ctc_spec.training import calibrate as calibrate_module
from vllm_ctc_spec.training.calibrate import calibrate, scale_logits, split_rows
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
def test_belief_equals_acceptance_on_the_calibration_rows(emission):
    target = tiny_target()
    objective = DraftObjective(tiny_drafter(target, emission=emission, label_length=4), target)
    rows = noisy_counting_rows(40)
    train(objective, rows)
    before, accepted = beliefs(objective, rows)
    assert before < 0.9 * accepted
    calibrate(objective, rows)
    believed, accepted = beliefs(objective, rows)
    assert believed == pytest.approx(accepted, rel=0.03)


def noisy_counting_rows(count: int) -> list[TrainingRow]:
    """Text that counts, but where every fourth token is random: what comes next is never certain."""
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


def beliefs(objective: DraftObjective, rows: list[TrainingRow]) -> tuple[float, float]:
    objective.eval()
    set_tables_from(objective.drafter, objective.target)
    return calibrate_module.expected_and_accepted(objective, calibrate_module._draft(objective, rows, 0), 1.0)


def test_rows_to_calibrate_on_are_not_trained_on():
    rows = noisy_counting_rows(100)
    trained, kept = split_rows(rows)
    assert (len(trained), len(kept)) == (95, 5)
    assert not {id(row) for row in trained} & {id(row) for row in kept}
    assert len(split_rows(rows, share=2, most=10)[1]) == 10
    assert split_rows(rows[:10]) == (rows[:10], [])


def test_rows_of_a_calibration_rows_prompt_are_not_trained_on():
    def row(prompt: int, answer: int) -> TrainingRow:
        return TrainingRow(torch.tensor([prompt, prompt + 1, answer]), torch.tensor([False, False, True]))

    trained, kept = split_rows([row(prompt, answer) for answer in range(3) for prompt in range(40)])
    assert (len(trained), len(kept)) == (3 * 38, 2)
    assert not {int(row.token_ids[0]) for row in trained} & {int(row.token_ids[0]) for row in kept}
