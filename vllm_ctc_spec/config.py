"""Typed settings: the drafter's architecture and the options of the speculative method."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

MAX_NODES = 63
"""Largest node budget: with the anchor, 64 rows, so that an ancestor mask is one int64."""

MAX_FRAMES = 16

TREES = ("prefix", "template", "chain")
EMISSIONS = ("independent", "conditioned")
ATTENTION_KERNELS = ("own", "xformers")


class CTCDrafterConfig(PretrainedConfig):
    """Architecture of a CTC drafter; stored as `config.json` beside its weights.

    `hidden_size`, `vocab_size`, `num_key_value_heads` and `head_dim` are the target's, because the drafter
    shares its embedding and LM head and keeps its keys and values in the same paged cache.
    `emission` names the family (see algorithm/ctc.py): "independent" (CTC, repeats merge) or "conditioned"
    (one label per frame, each emission conditioned on the emitted tokens through tables of rank `condition_rank`).
    `draft_vocab_size` tokens, which stand beside the weights, are all that is ever drafted; None for every token.
    """

    model_type = "ctc_drafter"

    def __init__(
        self,
        hidden_size: int = 384,
        vocab_size: int = 8192,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 3,
        head_dim: int = 64,
        intermediate_size: int = 1024,
        num_hidden_layers: int = 1,
        num_frames: int = 8,
        label_length: int = 8,
        emission: Literal["independent", "conditioned"] = "conditioned",
        condition_rank: int = 256,
        draft_vocab_size: int | None = None,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_frames = num_frames
        self.label_length = label_length
        self.emission = emission
        self.condition_rank = condition_rank
        self.draft_vocab_size = draft_vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        if emission not in EMISSIONS:
            raise ValueError(f"emission={emission!r} in the drafter's config.json: use one of {EMISSIONS}.")
        if not 1 <= label_length <= num_frames <= MAX_FRAMES:
            raise ValueError(
                f"label_length={label_length}, num_frames={num_frames} in the drafter's config.json: "
                f"needs 1 <= label_length <= num_frames <= {MAX_FRAMES}."
            )
        if draft_vocab_size is not None and not 1 <= draft_vocab_size <= vocab_size:
            raise ValueError(
                f"draft_vocab_size={draft_vocab_size} in the drafter's config.json: use a number from 1 to "
                f"vocab_size={vocab_size}, or null to draft every token."
            )

    @property
    def has_blank(self) -> bool:
        """Whether a frame may be blank: conditioned labels without slack stand at a frame each."""
        return self.emission == "independent" or self.label_length < self.num_frames


@dataclass(frozen=True)
class SpecOptions:
    """Our keys of `speculative_config`, beside vLLM's `method`, `model` and `num_speculative_tokens`.

    tree: how the frames become a token tree; "template" (the paper's) and "chain" are for comparison.
    candidates: tokens that the tree is made of, for each frame; the others are one mass of probability.
    min_prefix_probability: nodes that the drafter believes less likely than this are not verified.
    adaptive_budget: verify only those nodes, up to the node budget, that make the batch faster (engine/adaptive/);
        a template tree is always verified whole.
    attention_kernel: what attends for trees and the drafter's frames; "xformers" on CUDA only.
    """

    tree: Literal["prefix", "template", "chain"] = "prefix"
    candidates: int = 32
    min_prefix_probability: float = 0.0
    adaptive_budget: bool = True
    attention_kernel: Literal["own", "xformers"] = "own"

    @property
    def adapts(self) -> bool:
        return self.adaptive_budget and self.tree != "template"

    def __post_init__(self) -> None:
        if self.tree not in TREES:
            raise ValueError(f"speculative_config tree={self.tree!r}: use one of {', '.join(TREES)}.")
        if not isinstance(self.candidates, int) or not 1 <= self.candidates <= 64:
            raise ValueError(f"speculative_config candidates={self.candidates!r}: use an integer from 1 to 64.")
        if not isinstance(self.min_prefix_probability, (int, float)) or not 0 <= self.min_prefix_probability < 1:
            raise ValueError(
                f"speculative_config min_prefix_probability={self.min_prefix_probability!r}: use a number in [0, 1)."
            )
        if not isinstance(self.adaptive_budget, bool):
            raise ValueError(f"speculative_config adaptive_budget={self.adaptive_budget!r}: use true or false.")
        if self.attention_kernel not in ATTENTION_KERNELS:
            raise ValueError(
                f"speculative_config attention_kernel={self.attention_kernel!r}: use one of "
                f"{', '.join(ATTENTION_KERNELS)}."
            )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> SpecOptions:
        """Raises ValueError that names every key that is not an option and the nearest one that is."""
        for key in options:
            if key not in cls.names():
                hint = did_you_mean(key, cls.names())
                raise ValueError(f"unknown key {key!r} in speculative_config.{hint} Options: {', '.join(cls.names())}.")
        return cls(**options)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A sentence for the end of an error, with a space before it; nothing where no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_node_budget(num_nodes: Any) -> int:
    """`num_speculative_tokens` is the node budget N."""
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(
            f"num_speculative_tokens={num_nodes!r}: the node budget of a token tree is an integer "
            f"from 1 to {MAX_NODES}."
        )
    return num_nodes
