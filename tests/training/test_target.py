"""The drafter's shape from the target's config, and targets that cannot have one."""

import pytest
from transformers import PhiConfig, PhiForCausalLM

from tests.training.tiny_models import VOCAB, tiny_target
from vllm_ctc_spec.training.target import drafter_config, load_target


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


def test_an_unknown_drafter_setting_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown drafter setting 'frames'"):
        drafter_config(tiny_target().config, frames=5)


def test_a_target_whose_head_has_a_bias_is_refused(tmp_path):
    config = PhiConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    PhiForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LM head with a bias"):
        load_target(str(tmp_path))
