"""A drafter with a draft vocabulary equals one that gives all other tokens probability 0."""

import copy

import pytest
import torch

from tests.training.tiny_models import VOCAB, tiny_drafter, tiny_target
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter import CTCDrafter, Draft
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of, over_all_tokens

DRAFTED = torch.tensor([9, 2, 40, 63, 17, 5, 31, 22, 58, 11, 12])


def restricted(drafter: CTCDrafter) -> CTCDrafter:
    fewer = copy.deepcopy(drafter)
    fewer.draft_only(DRAFTED)
    return fewer


def some_draft(drafter: CTCDrafter) -> Draft:
    rank = drafter.config.condition_rank if drafter.config.emission == "conditioned" else 0
    return Draft(torch.randn(3, 4, 32), torch.randn(3, rank), 1 + 0.1 * torch.randn(3, rank))


@pytest.mark.parametrize("tree", ["prefix", "chain", "template"])
@pytest.mark.parametrize(("emission", "label_length"), [("conditioned", 4), ("conditioned", 3), ("independent", 3)])
@pytest.mark.parametrize("candidates", [2, 16])
@torch.no_grad()
def test_the_trees_are_those_of_all_tokens_where_the_others_are_impossible(tree, emission, label_length, candidates):
    target = tiny_target()
    drafter = tiny_drafter(target, emission=emission, label_length=label_length)
    fewer, draft, options = restricted(drafter), some_draft(drafter), SpecOptions(tree=tree, candidates=candidates)
    every = emission_logits(drafter, draft.frames, head_of(drafter, target.lm_head.weight))
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[DRAFTED] = False
    every[..., :VOCAB].masked_fill_(others, -torch.inf)
    some = emission_logits(fewer, draft.frames, head_of(fewer, target.lm_head.weight))
    assert some.shape[-1] == len(DRAFTED) + drafter.config.has_blank
    torch.testing.assert_close(over_all_tokens(fewer, some), every)

    expected = draft_trees(drafter, draft, every, 24, options)
    found = draft_trees(fewer, draft, some, 24, options)
    assert expected.num_nodes.min() > 3
    for name in ("tokens", "parents", "depths", "num_nodes"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(found.prefix_logp, expected.prefix_logp)
