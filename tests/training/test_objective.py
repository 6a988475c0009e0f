"""The wiring of the many-anchor training pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.tiny_models import VOCAB, tiny_drafter, tiny_target
from vllm_ctc_spec.drafter import Draft, KeyValue
from vllm_ctc_spec.training.objective import DraftObjective, target_hidden

ANCHORS = torch.tensor([[1, 5, 19], [7, 2, 8]])


def one_anchor(objective: DraftObjective, input_ids: Tensor, anchor: int) -> Draft:
    """As a serving step computes it: the text up to the anchor is all there is."""
    layers = objective.drafter.config.target_layers
    hidden = objective.drafter.fuse(target_hidden(objective.target, input_ids[None, :anchor], layers)[0])
    context = objective.drafter.context(hidden, torch.arange(anchor))

    def attend(layer: int, query: Tensor, own: KeyValue) -> Tensor:
        keys, values = (torch.cat(pair).transpose(0, 1) for pair in zip(context[layer], own))
        out = F.scaled_dot_product_attention(query.transpose(0, 1)[None], keys[None], values[None], enable_gqa=True)
        return out[0].transpose(0, 1)

    embeddings = objective.target.get_input_embeddings()(input_ids[anchor - 1 : anchor + 1])
    return objective.drafter(embeddings, hidden[-1], torch.tensor(anchor), attend)


@pytest.mark.parametrize(("num_layers", "target_layers"), [(1, []), (2, []), (1, [0, 1])])
@torch.no_grad()
def test_many_anchors_in_one_pass_equal_one_step_each(num_layers, target_layers):
    target = tiny_target()
    drafter = tiny_drafter(target, num_hidden_layers=num_layers, target_layers=target_layers)
    objective = DraftObjective(drafter, target)
    input_ids = torch.randint(VOCAB, (2, 20))
    draft = objective.draft(input_ids, ANCHORS)
    for row, anchors in enumerate(ANCHORS.tolist()):
        for column, anchor in enumerate(anchors):
            alone = one_anchor(objective, input_ids[row], anchor)
            for together, single in zip(draft, alone, strict=True):
                torch.testing.assert_close(together[row, column], single, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_nothing_at_or_after_the_anchor_but_the_anchor_reaches_its_draft():
    target = tiny_target()
    objective = DraftObjective(tiny_drafter(target, target_layers=[1]), target)
    input_ids = torch.randint(VOCAB, (1, 20))
    anchors = torch.tensor([[9]])
    draft = objective.draft(input_ids, anchors)
    for position, same in ((8, False), (9, False), (10, True), (19, True)):
        changed = input_ids.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCAB
        others = objective.draft(changed, anchors)
        assert all(torch.allclose(own, other, atol=1e-6) == same for own, other in zip(draft, others, strict=True))


@torch.no_grad()
def test_each_label_is_learnt_from_the_targets_distribution_after_the_text_before_it(monkeypatch):
    target = tiny_target()
    objective = DraftObjective(tiny_drafter(target, label_length=4, target_layers=[1]), target, label_temperature=0.5)
    given = {}
    monkeypatch.setattr(
        "vllm_ctc_spec.training.objective.distillation_loss", lambda *arguments: given.update(teacher=arguments[5])
    )
    input_ids, valid = torch.randint(VOCAB, (2, 20)), torch.tensor([[True, True, False], [True, True, True]])
    objective(input_ids, ANCHORS, valid, torch.randint(VOCAB, (2, 3, 4)))
    teacher, logits = given["teacher"], target(input_ids).logits
    ours = teacher.logits_of(teacher.hidden @ target.lm_head.weight.T)[teacher.before_labels]
    theirs = [
        [logits[row, min(anchor + u, 19)] for u in range(4)] for row, anchor in ((0, 1), (0, 5), (1, 7), (1, 2), (1, 8))
    ]
    torch.testing.assert_close(ours, torch.stack([torch.stack(each) for each in theirs]))
    assert teacher.temperature == 0.5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("emission", ["conditioned", "independent"])
def test_the_loss_reaches_every_drafter_weight_and_no_target_weight(tied, emission):
    target = tiny_target(tied)
    drafter = tiny_drafter(target, emission=emission, target_layers=[1])
    objective = DraftObjective(drafter, target).train()
    input_ids = torch.randint(VOCAB, (2, 20))
    valid = torch.tensor([[True, True, False], [True, True, True]])
    labels = torch.randint(VOCAB, (2, 3, 3))
    objective(input_ids, ANCHORS, valid, labels).mean.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in drafter.parameters())
    assert all(p.grad is None for p in target.parameters())
    assert not target.training
