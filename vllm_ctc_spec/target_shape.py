"""Reads the sizes of a target from its Hugging Face config, whose field names differ between model families."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

INTERMEDIATE_SIZE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""The field's names in different model families."""


@dataclass(frozen=True)
class TargetShape:
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope_theta: float
    """The target's rotary base; 10000, for the drafter only, if the target has no rotary positions."""


def target_shape(config: PretrainedConfig) -> TargetShape:
    """The target's sizes. Raises ValueError if a field is missing under all known names."""
    text = config.get_text_config()
    heads, hidden_size = _first(text, "num_attention_heads"), _first(text, "hidden_size")
    return TargetShape(
        hidden_size=hidden_size,
        vocab_size=_first(text, "vocab_size"),
        num_attention_heads=heads,
        num_key_value_heads=_num_key_value_heads(text, heads),
        head_dim=getattr(text, "head_dim", None) or hidden_size // heads,
        # GPT-2 and Falcon may omit it, which means 4 * hidden_size.
        intermediate_size=_first(text, *INTERMEDIATE_SIZE, default=4 * hidden_size),
        max_position_embeddings=_first(text, "max_position_embeddings"),
        rope_theta=_rope_theta(text),
    )


def _num_key_value_heads(text: PretrainedConfig, heads: int) -> int:
    if text.model_type == "falcon" and not text.new_decoder_architecture:
        # `num_kv_heads` is used by the new architecture only.
        return 1 if text.multi_query else heads
    if text.model_type == "gpt_bigcode":
        return 1 if text.multi_query else heads
    return _first(text, "num_key_value_heads", "num_kv_heads", default=heads)


def _rope_theta(text: PretrainedConfig) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    # Of layers with a window and without, the latter are like the drafter's.
    parameters = parameters.get("full_attention") or parameters
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)


def _first(text: PretrainedConfig, *names: str, default: int | None = None) -> int:
    for name in names:
        if getattr(text, name, None):
            return int(getattr(text, name))
    if default is None:
        raise ValueError(
            f"target of model_type {text.model_type!r}: its config.json has no {names[0]!r}. Use a decoder-only "
            "language model whose config has it."
        )
    return default
