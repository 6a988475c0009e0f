"""A drafter that starts from another drafts as that one does."""

import pytest
import torch

from tests.training.tiny_models import VOCAB, tiny_drafter, tiny_target
from vllm_ctc_spec.training.objective import DraftObjective
from vllm_ctc_spec.training.warm_start import start_from


def drafts(drafter, target):
    torch.manual_seed(2)
    return DraftObjective(drafter, target).draft(torch.randint(VOCAB, (2, 20)), torch.tensor([[1, 5], [7, 19]]))


@pytest.mark.parametrize("theirs", [[], [1]])
@torch.no_grad()
def test_both_draft_alike_even_if_one_reads_more_layers(tmp_path, theirs):
    target = tiny_target()
    other = tiny_drafter(target, target_layers=theirs)
    for weight in other.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    other.save_pretrained(tmp_path)
    drafter = tiny_drafter(target, target_layers=[1], draft_vocab_size=VOCAB - 1)
    assert not torch.allclose(drafts(drafter, target).frames, drafts(other, target).frames)
    start_from(drafter, tmp_path)
    for ours, expected in zip(drafts(drafter, target), drafts(other, target), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 5}, "that drafter has num_frames 4, this one 5"),
        ({"condition_rank": 4}, "condition_rank 8, this one 4"),
        ({"label_length": 4}, "has_blank True, this one False"),
        ({"target_layers": [0]}, r"target_layers \[1\], this one \[0\]"),
        ({"target_layers": []}, r"target_layers \[1\], this one \[\]"),
    ],
)
def test_a_drafter_of_another_shape_is_refused_by_the_setting(tmp_path, fields, message):
    target = tiny_target()
    tiny_drafter(target, target_layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        start_from(tiny_drafter(target, **{"target_layers": [1]} | fields), tmp_path)
