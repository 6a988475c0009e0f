"""A target's shape, read from its Hugging Face config in one place: for training, for the K/V cache and for serving."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

INTERMEDIATE_SIZE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Names that families have for it."""


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
    """Of the drafter's own positions where the target has none of that kind."""


def target_shape(config: PretrainedConfig) -> TargetShape:
    """Raises ValueError where a field has none of the names that are known."""
    text = config.get_text_config()
    heads, hidden_size = _first(text, "num_attention_heads"), _first(text, "hidden_size")
    return TargetShape(
        hidden_size=hidden_size,
        vocab_size=_first(text, "vocab_size"),
        num_attention_heads=heads,
        num_key_value_heads=_num_key_value_heads(text, heads),
        head_dim=getattr(text, "head_dim", None) or hidden_size // heads,
        # GPT-2 and Falcon leave it out, which means four times the width.
        intermediate_size=_first(text, *INTERMEDIATE_SIZE, or_else=4 * hidden_size),
        max_position_embeddings=_first(text, "max_position_embeddings"),
        rope_theta=_rope_theta(text),
    )


def _num_key_value_heads(text: PretrainedConfig, heads: int) -> int:
    if text.model_type == "falcon" and not text.new_decoder_architecture:
        # Its `num_kv_heads` counts in the new architecture only.
        return 1 if text.multi_query else heads
    if text.model_type == "gpt_bigcode":
        return 1 if text.multi_query else heads
    return _first(text, "num_key_value_heads", "num_kv_heads", or_else=heads)


def _rope_theta(text: PretrainedConfig) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)


def _first(text: PretrainedConfig, *names: str, or_else: int | None = None) -> int:
    for name in names:
        if getattr(text, name, None):
            return int(getattr(text, name))
    if or_else is None:
        raise ValueError(
            f"target of model_type {text.model_type!r}: its config.json has no {names[0]!r}. Use a decoder-only "
            "language model whose config has it."
        )
    return or_else
