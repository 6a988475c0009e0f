"""Typed settings: the drafter's architecture and the options of the speculative method."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from transformers import PretrainedConfig

MAX_NODES = 63
"""Largest node budget. With the anchor these are 64 rows, so that an ancestor mask fits an int64."""

MAX_FRAMES = 16

TREES = ("prefix", "template", "chain")
EMISSIONS = ("independent", "conditioned")
ATTENTION_KERNELS = ("own", "xformers")
RETRIEVING = ("request", "request+answers")
RETRIEVALS = ("auto", "off", *RETRIEVING)

_COUNTS = (
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_hidden_layers",
    "num_frames",
    "label_length",
    "max_position_embeddings",
)
"""Fields of a drafter's config that are counts."""


class CTCDrafterConfig(PretrainedConfig):
    """Architecture of a CTC drafter, stored as `config.json` beside its weights.

    `hidden_size`, `vocab_size`, `num_key_value_heads` and `head_dim` must be the target's, because the drafter shares
    its embedding and LM head, and its keys and values are in the same paged cache.
    `emission` is the family (algorithm/ctc.py): "independent" (CTC, repeats merge) or "conditioned" (one label per
    frame, conditioned on the emitted tokens through tables of rank `condition_rank`).
    `draft_vocab_size` is the number of tokens that are drafted, whose ids are stored with the weights; None: all.
    `target_layers` are the layers of the target that the drafter reads beside the last hidden state, numbered as vLLM's
    auxiliary hidden states: 0 is the embeddings, i the output of the i-th layer.
    `targets` are the names of the target that it was trained for, as target_names.py gives them.

    Raises ValueError that names the field if a value is not usable.
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
        target_layers: Sequence[int] = (),
        targets: Sequence[str] = (),
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
        self.target_layers = target_layers
        self.targets = targets
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self._check_numbers()
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
        layers = list(target_layers) if isinstance(target_layers, Sequence) else [None]
        if not all(is_integer(layer, 0) for layer in layers) or layers != sorted(set(layers)):
            raise ValueError(
                f"target_layers={target_layers!r} in the drafter's config.json: use a list of increasing layer "
                "numbers, or an empty one for the last hidden state alone."
            )
        self.target_layers = layers
        is_list = isinstance(targets, Sequence) and not isinstance(targets, str)
        if not is_list or not all(isinstance(name, str) for name in targets):
            raise ValueError(f"targets={targets!r} in the drafter's config.json: use a list of names, or an empty one.")
        self.targets = list(targets)

    def _check_numbers(self) -> None:
        """Raises ValueError that names the field. Called first, because the other checks need numbers."""
        needs = {name: (is_integer(getattr(self, name), 1), "an integer of at least 1") for name in _COUNTS}
        needs["condition_rank"] = is_integer(self.condition_rank, 0), "an integer of at least 0"
        optional = self.draft_vocab_size is None or is_integer(self.draft_vocab_size)
        needs["draft_vocab_size"] = optional, "an integer, or null to draft every token"
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            needs[name] = is_number(getattr(self, name)) and 0 < getattr(self, name) < math.inf, "a number above 0"
        for name, (is_good, need) in needs.items():
            if not is_good:
                raise ValueError(f"{name}={getattr(self, name)!r} in the drafter's config.json: use {need}.")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}, num_key_value_heads={self.num_key_value_heads}, "
                f"head_dim={self.head_dim} in the drafter's config.json: use a multiple of num_key_value_heads and an "
                "even head_dim."
            )

    @property
    def has_blank(self) -> bool:
        """False if each frame has one label: conditioned emissions with as many labels as frames."""
        return self.emission == "independent" or self.label_length < self.num_frames


@dataclass(frozen=True)
class SpecOptions:
    """Our keys of `speculative_config`, beside vLLM's `method`, `model` and `num_speculative_tokens`.

    tree: "prefix" is the optimal tree; "template" (arXiv 2412.00061) and "chain" (greedy path) are for comparison.
    candidates: candidate tokens per frame. A tree has tokens only from the T * candidates ones whose largest
        probability in any frame is highest.
    min_prefix_probability: nodes with a smaller prefix probability are not verified.
    adaptive_budget: verify as many nodes, up to the node budget, as make the batch faster (engine/adaptive/); a
        template tree is always verified whole.
    attention_kernel: kernel for tree attention and for the drafter's frames; "xformers" on CUDA only.
    record: file to which served prompts and answers are appended, as training rows (engine/recording.py).
    record_limit_mb: size that this file does not exceed.
    retrieval: draft again what followed the same tokens before, in the request's own text or also in earlier answers of
        this process; needs the extra "suffix". "auto" is "request" where the library is installed, the tree is a prefix
        tree and V1 serves (engine/settings.py decides), else "off".
    retrieval_depth: most tokens ahead that retrieval drafts.
    """

    tree: Literal["prefix", "template", "chain"] = "prefix"
    candidates: int = 32
    min_prefix_probability: float = 0.0
    adaptive_budget: bool = True
    attention_kernel: Literal["own", "xformers"] = "own"
    record: str | os.PathLike[str] | None = None
    record_limit_mb: int = 256
    retrieval: Literal["auto", "off", "request", "request+answers"] = "auto"
    retrieval_depth: int = 32

    @property
    def adapts(self) -> bool:
        """Whether the node budget is adaptive."""
        return self.adaptive_budget and self.tree != "template"

    @property
    def retrieves(self) -> bool:
        return self.retrieval in RETRIEVING

    def __post_init__(self) -> None:
        if self.tree not in TREES:
            raise ValueError(f"speculative_config tree={self.tree!r}: use one of {', '.join(TREES)}.")
        if not is_integer(self.candidates, 1) or self.candidates > 64:
            raise ValueError(f"speculative_config candidates={self.candidates!r}: use an integer from 1 to 64.")
        if not is_number(self.min_prefix_probability) or not 0 <= self.min_prefix_probability < 1:
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
        if self.record is not None and (not isinstance(self.record, str | os.PathLike) or not os.fspath(self.record)):
            raise ValueError(f"speculative_config record={self.record!r}: give the path of a file, or leave it out.")
        if not is_integer(self.record_limit_mb, 1):
            raise ValueError(
                f"speculative_config record_limit_mb={self.record_limit_mb!r}: use an integer of at least 1."
            )
        if self.retrieval not in RETRIEVALS:
            raise ValueError(f"speculative_config retrieval={self.retrieval!r}: use one of {', '.join(RETRIEVALS)}.")
        if not is_integer(self.retrieval_depth, 1) or self.retrieval_depth > MAX_NODES:
            raise ValueError(
                f"speculative_config retrieval_depth={self.retrieval_depth!r}: use an integer from 1 to {MAX_NODES}."
            )
        if self.retrieves and self.tree != "prefix":
            raise ValueError(
                f"speculative_config retrieval={self.retrieval!r} with tree={self.tree!r}: it needs a prefix tree. "
                "Leave one of them out."
            )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> SpecOptions:
        """Raises ValueError that names the first unknown key and the option nearest to it."""
        for key in options:
            if key not in cls.names():
                hint = did_you_mean(key, cls.names())
                raise ValueError(f"unknown key {key!r} in speculative_config.{hint} Options: {', '.join(cls.names())}.")
        return cls(**options)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """A sentence to append to an error, with a leading space; empty if no known name is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_node_budget(num_nodes: Any) -> int:
    """num_nodes: of `num_speculative_tokens`. Raises ValueError unless it is an integer from 1 to MAX_NODES."""
    if not is_integer(num_nodes, 1) or num_nodes > MAX_NODES:
        raise ValueError(
            f"num_speculative_tokens={num_nodes!r}: the node budget of a token tree is an integer "
            f"from 1 to {MAX_NODES}."
        )
    return cast(int, num_nodes)


def is_integer(value: Any, least: int | None = None) -> bool:
    """Whether `value` is an int, not a bool, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: Any) -> bool:
    return is_integer(value) or isinstance(value, float)


def goes_without_drafter(settings: Mapping[str, Any]) -> bool:
    """Whether a `speculative_config` of ours sets `model` to null, which with retrieval means no drafter.

    Without retrieval it means the target's own, as leaving it out does.
    """
    return "model" in settings and settings["model"] is None and settings.get("retrieval") in RETRIEVING
