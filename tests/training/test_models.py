"""The drafter's default configuration, targets that are refused, and first weights from another drafter."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from tests.training.tiny_models import VOCAB, tiny_drafter, tiny_target
from vllm_ctc_spec.drafter.drafting import emission_logits, head_of
from vllm_ctc_spec.training.fit import dry_run
from vllm_ctc_spec.training.models import (
    check_target,
    drafter_config,
    load_target,
    load_without_layers,
    logit_multiplier,
    logits_of,
    start_from,
    start_like,
)
from vllm_ctc_spec.training.objective import DraftObjective


def test_the_drafter_has_the_targets_shapes():
    config = drafter_config(tiny_target().config, num_frames=9)
    assert (config.hidden_size, config.vocab_size, config.num_key_value_heads, config.head_dim) == (32, VOCAB, 2, 16)
    assert (config.rope_theta, config.max_position_embeddings, config.num_frames) == (5000.0, 128, 9)


@pytest.mark.parametrize(("vocab_size", "drafted"), [(2048, None), (4096, 2048), (131_072, 32_768)])
def test_of_a_large_vocabulary_the_frequent_tokens_are_drafted(vocab_size, drafted):
    target = tiny_target(vocab_size=vocab_size).config
    assert drafter_config(target).draft_vocab_size == drafted
    assert drafter_config(target, draft_vocab_size=None).draft_vocab_size is None


@pytest.mark.parametrize(
    ("architecture", "num_layers", "layers"),
    [
        ("LlamaForCausalLM", 30, [2, 15, 27]),
        ("LlamaForCausalLM", 2, [1]),
        ("LlamaForCausalLM", 1, []),
        ("GPT2LMHeadModel", 30, []),
        ("OfAnotherLibrary", 30, []),
    ],
)
def test_three_layers_are_read_where_vllm_hands_them_out(architecture, num_layers, layers):
    target = tiny_target(num_hidden_layers=2).config
    target.architectures, target.num_hidden_layers = [architecture], num_layers
    assert drafter_config(target).target_layers == layers
    assert drafter_config(target, target_layers=[]).target_layers == []


def test_a_layer_that_the_target_lacks_is_refused():
    with pytest.raises(ValueError, match=r"target_layers=\[1, 2\]: the target has 2 layers and no 2"):
        drafter_config(tiny_target().config, target_layers=[1, 2])


@pytest.mark.parametrize("layers", [[2, 1], [1, 1], [-1], [True], ["1"]])
def test_layers_that_are_no_increasing_numbers_are_refused(layers):
    with pytest.raises(ValueError, match="a list of increasing layer"):
        drafter_config(tiny_target().config, target_layers=layers)


BIASED = PhiConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)

SHAPES = {
    "GPT-2": (GPT2Config(n_embd=64, n_head=4), (64, 4, 4, 16, 256)),
    "GPT-2, width given": (GPT2Config(n_embd=64, n_head=4, n_inner=100), (64, 4, 4, 16, 100)),
    "OPT": (OPTConfig(hidden_size=64, num_attention_heads=4, ffn_dim=96), (64, 4, 4, 16, 96)),
    "Falcon, one K/V head": (
        FalconConfig(hidden_size=64, num_attention_heads=4, multi_query=True),
        (64, 4, 1, 16, 256),
    ),
    "Falcon, K/V heads": (FalconConfig(hidden_size=64, num_attention_heads=4, multi_query=False), (64, 4, 4, 16, 256)),
    "Falcon, new": (
        FalconConfig(hidden_size=64, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
        (64, 4, 2, 16, 256),
    ),
}


@pytest.mark.parametrize(("config", "shape"), SHAPES.values(), ids=SHAPES)
def test_families_that_name_their_sizes_otherwise_have_a_drafter(config, shape):
    found = drafter_config(config)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    assert tuple(getattr(found, name) for name in names) == shape


def test_a_config_without_a_size_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model_type 'mamba'.*no 'num_attention_heads'"):
        drafter_config(MambaConfig())


def test_an_unknown_drafter_setting_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown drafter setting 'frames'"):
        drafter_config(tiny_target().config, frames=5)


@pytest.mark.parametrize("check", [load_target, check_target])
def test_a_target_whose_head_has_a_bias_is_refused(check, tmp_path):
    PhiForCausalLM(BIASED).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LM head with a bias"):
        check(str(tmp_path))


@pytest.mark.parametrize("check", [load_target, check_target])
def test_a_target_with_narrow_embeddings_is_refused(check, tmp_path):
    config = OPTConfig(hidden_size=64, num_attention_heads=4, ffn_dim=96, num_hidden_layers=1, word_embed_proj_dim=32)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embeddings of 32 numbers and layers of 64"):
        check(str(tmp_path))


def test_soft_caps_are_computed(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, initializer_range=0.5)).save_pretrained(tmp_path)
    target = load_target(str(tmp_path))
    tokens = torch.arange(20)[None]
    every_cap = []
    for soft_cap in (1.0, 1e6):
        for layer in target.model.layers:
            layer.self_attn.attn_logit_softcapping = soft_cap
        with torch.inference_mode():
            every_cap.append(target(tokens).logits)
    assert (every_cap[0] - every_cap[1]).abs().max() > 0.1


def test_a_dry_run_refuses_what_fit_refuses(tmp_path):
    PhiForCausalLM(BIASED).save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="LM head with a bias"):
        dry_run(str(tmp_path / "target"), None, tmp_path / "drafter")


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


@pytest.mark.parametrize(("room", "drafted"), [(3, {9, 4, 7}), (6, {9, 4, 7, 0, 1, 2}), (2, {9, 4})])
def test_the_tokens_that_the_other_drafts_are_drafted_first(tmp_path, room, drafted):
    target = tiny_target()
    other = tiny_drafter(target, draft_vocab_size=3)
    other.draft_only(torch.tensor([9, 4, 7]))
    other.save_pretrained(tmp_path)
    drafter = tiny_drafter(target, draft_vocab_size=room)
    start_from(drafter, tmp_path)
    assert set(drafter.draft_vocab.tolist()) == drafted


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


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
SMALL |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}


@torch.no_grad()
def head_products(target: PreTrainedModel, text: Tensor) -> Tensor:
    return target.get_output_embeddings()(target.get_decoder()(text).last_hidden_state)


@torch.no_grad()
def test_a_soft_cap_of_logits_is_known():
    target = Gemma2ForCausalLM(Gemma2Config(**SMALL | {"initializer_range": 3.0}, final_logit_softcapping=5.0)).eval()
    text = torch.randint(VOCAB, (1, 20))
    assert head_products(target, text).abs().max() > 10
    torch.testing.assert_close(logits_of(target)(head_products(target, text)), target(text).logits)


MULTIPLIED = {
    "Granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 16.0}, {"logits_scaling": 1.0}),
    "Cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 1 / 16}, {"logit_scale": 1.0}),
}


@pytest.mark.parametrize(("model", "config", "scaled", "plain"), MULTIPLIED.values(), ids=MULTIPLIED)
@torch.no_grad()
def test_a_target_that_multiplies_its_logits_is_one_with_another_head(model, config, scaled, plain):
    torch.manual_seed(0)
    target = model(config(**SMALL, **scaled, tie_word_embeddings=False)).eval()
    twin = model(config(**SMALL, **plain, tie_word_embeddings=False)).eval()
    twin.load_state_dict(target.state_dict())
    twin.lm_head.weight.div_(16)
    text = torch.randint(VOCAB, (1, 20))
    torch.testing.assert_close(twin(text).logits, target(text).logits)
    assert logit_multiplier(target) == pytest.approx(1 / 16) and logit_multiplier(twin) == 1
    torch.testing.assert_close(logits_of(target)(head_products(target, text)), target(text).logits)

    drafts = []
    for each in (target, twin):
        drafter = tiny_drafter(each)
        start_like(drafter, each)
        draft = DraftObjective(drafter, each).draft(text, torch.tensor([[5, 19]])).of(torch.ones(1, 2).bool())
        drafts.append((emission_logits(drafter, draft.frames, head_of(drafter, each.lm_head.weight)), draft.gate))
    for ours, theirs in zip(*drafts, strict=True):
        torch.testing.assert_close(ours, theirs)


WITHOUT_LAYERS = {
    "Llama": tiny_target(tied=False),
    "Llama, one matrix": tiny_target(tied=True),
    **{name: MULTIPLIED[name][0](MULTIPLIED[name][1](**SMALL, **MULTIPLIED[name][2])) for name in MULTIPLIED},
    "Gemma 2": Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)),
}


@pytest.mark.parametrize("target", WITHOUT_LAYERS.values(), ids=WITHOUT_LAYERS)
@torch.no_grad()
def test_without_layers_a_target_has_its_embedding_head_and_logits(target, tmp_path):
    target.save_pretrained(tmp_path)
    whole, light = load_target(str(tmp_path)), load_without_layers(str(tmp_path))
    assert not any("layers" in name for name in light.state_dict())
    text, products = torch.arange(VOCAB), 9 * torch.randn(3, VOCAB)
    assert torch.equal(light.get_input_embeddings()(text), whole.get_input_embeddings()(text))
    assert torch.equal(light.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    torch.testing.assert_close(logits_of(light)(products), logits_of(whole)(products), rtol=1e-2, atol=1e-2)


def change_weights(folder, function):
    path = folder / "model.safetensors"
    save_file(function(load_file(path)), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: {"lm_head.qweight": weights.pop("lm_head.weight"), **weights}, "lm_head.qweight"),
        (lambda weights: {"lm_head.weight_scale": torch.ones(VOCAB, 1), **weights}, "lm_head.weight_scale"),
        (lambda weights: {"model.embed_tokens.scales": torch.ones(VOCAB), **weights}, "model.embed_tokens.scales"),
    ],
)
def test_a_quantized_head_or_embedding_is_refused(tmp_path, change, named):
    tiny_target(tied=False).save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=rf"is quantized or missing \(.*{named}"):
        load_without_layers(str(tmp_path))


def test_a_target_of_which_weights_are_missing_is_refused(tmp_path):
    tiny_target().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {name: weights[name] for name in weights if "layers.1.mlp" not in name})
    with pytest.raises(ValueError, match=r"misses 3 of its weights, model.layers.1.mlp.down_proj.weight among them"):
        load_target(str(tmp_path))
