"""What training needs of a Hugging Face target, and the drafter that fits it."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vllm_ctc_spec.drafter import CTCDrafterConfig
from vllm_ctc_spec.engine.target_layers import hands_out_layers
from vllm_ctc_spec.precision import target_dtype
from vllm_ctc_spec.training.data import num_frequent


def load_target(path: str) -> PreTrainedModel:
    """The target, whose LM head must be a plain matrix: the drafter shares it."""
    target = AutoModelForCausalLM.from_pretrained(path, dtype=target_dtype())
    head = target.get_output_embeddings()
    if head is None or target.get_input_embeddings() is None:
        raise ValueError(
            f"target {path!r} ({type(target).__name__}) has no LM head or no token embedding to share with a drafter. "
            "Use a decoder-only language model."
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"target {path!r} has an LM head with a bias, which drafters do not support yet.")
    return target


def drafter_config(target: PretrainedConfig, **overrides: Any) -> CTCDrafterConfig:
    """The drafter that shares the target's embedding, LM head, K/V shape and rotary base, drafts frequent tokens, and
    reads three of the target's layers beside the last hidden state, where vLLM hands them out.

    `overrides` are fields of CTCDrafterConfig; an unknown one is refused by name.
    """
    text = target.get_text_config()
    heads = text.num_attention_heads
    fields = {
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "intermediate_size": text.intermediate_size,
        "rope_theta": _rope_theta(text),
        "max_position_embeddings": text.max_position_embeddings,
        "draft_vocab_size": num_frequent(text.vocab_size),
    }
    if "target_layers" not in overrides and hands_out_layers(target.architectures or ()):
        fields["target_layers"] = three_layers(text.num_hidden_layers)
    known = CTCDrafterConfig().to_dict()
    for name in overrides:
        if name not in known:
            raise ValueError(f"unknown drafter setting {name!r}. Settings: {', '.join(sorted(known))}.")
    config = CTCDrafterConfig(**fields | overrides)
    if beyond := [layer for layer in config.target_layers if layer >= text.num_hidden_layers]:
        raise ValueError(
            f"target_layers={config.target_layers}: the target has {text.num_hidden_layers} layers and no {beyond[0]}. "
            f"Use numbers from 0 to {text.num_hidden_layers - 1}."
        )
    return config


def three_layers(num_layers: int) -> list[int]:
    """A low, a middle and a high one of the target's layers, those that EAGLE-3 reads in vLLM; fewer of a small target.

    As `target_layers` of CTCDrafterConfig.
    """
    return sorted({layer for layer in (2, num_layers // 2, num_layers - 3) if 0 < layer < num_layers})


def _rope_theta(text: PretrainedConfig) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)
