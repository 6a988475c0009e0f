"""Reading a drafter folder gives the saved drafter, or one clear error."""

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from vllm_ctc_spec.config import CTCDrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter, KeyValue
from vllm_ctc_spec.drafter.checkpoint import check_drafter


def drafter(emission: str = "conditioned") -> CTCDrafter:
    torch.manual_seed(0)
    config = CTCDrafterConfig(
        hidden_size=32,
        vocab_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_frames=5,
        label_length=4,
        emission=emission,
        condition_rank=6,
    )
    model = CTCDrafter(config).eval()
    model.draft_only(torch.randperm(40)[:7])
    return model


def run(model: CTCDrafter) -> list[Tensor]:
    """Every output of the module, with attention reduced to the mean of its own values."""
    generator = torch.Generator().manual_seed(1)
    hidden, embeddings = torch.randn(3, 32, generator=generator), torch.randn(3, 2, 32, generator=generator)
    positions = torch.tensor([4, 9, 70])

    def attend(layer: int, query: Tensor, own: KeyValue) -> Tensor:
        return query + own.value.mean(-3, keepdim=True).repeat_interleave(2, dim=-2)

    frames, start, gate = model(embeddings, hidden, positions, attend)
    context = [x for pair in model.context(hidden, positions) for x in pair]
    return [frames, start, gate, model.blank_logits(frames), *context]


@pytest.mark.parametrize("emission", ["conditioned", "independent"])
@torch.no_grad()
def test_a_saved_drafter_loads_through_automodel_unchanged(emission, tmp_path):
    saved = drafter(emission)
    saved.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, CTCDrafter)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CTCDrafterConfig)
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in saved.state_dict().items())
    # Products may round differently where the loaded weights are aligned differently in memory.
    torch.testing.assert_close(run(saved), run(loaded), atol=1e-6, rtol=1e-6)
    assert check_drafter(str(tmp_path)).emission == emission


@torch.no_grad()
def test_frames_depend_on_positions_only_through_their_differences_to_keys():
    """Rotary positions: shifting anchor and context together changes no score between them."""
    model, layer = drafter(), drafter().layers[0]
    x = torch.randn(2, 32)

    def score(shift: int) -> Tensor:
        key = layer.context(x[0], torch.tensor(3 + shift)).key
        captured = []

        def attend(query: Tensor, own: KeyValue) -> Tensor:
            captured.append(query)
            return query

        layer(x[1], torch.tensor(11 + shift), attend)
        return captured[0].unflatten(0, (2, 2)) @ key[..., None]

    assert model.config.rope_theta > 1
    torch.testing.assert_close(score(0), score(500), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [0, 41])
def test_a_draft_vocabulary_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match=f"draft_vocab_size={size} in the drafter's config.json"):
        CTCDrafterConfig(vocab_size=40, draft_vocab_size=size)


def test_a_truncated_weights_file_is_refused(tmp_path):
    drafter().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="missing or truncated"):
        check_drafter(str(tmp_path))
