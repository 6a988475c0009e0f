"""Loads a target for training, chooses its drafter's configuration, and copies first weights from another drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from vllm_ctc_spec.drafter import CTCDrafter, CTCDrafterConfig
from vllm_ctc_spec.drafter.checkpoint import WEIGHTS, check_drafter
from vllm_ctc_spec.engine.target_layers import hands_out_layers
from vllm_ctc_spec.machine import target_dtype
from vllm_ctc_spec.target_shape import target_shape
from vllm_ctc_spec.training.data import num_frequent


def load_target(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load the target in `target_dtype`. Raises ValueError if weights are missing, or if its LM head is not one plain
    matrix [V, H], which the drafter shares.

    trust_remote_code: run the code that its folder or repository brings.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, **options)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        # The default, by PyTorch's own function, leaves the soft caps out, which the engine does not.
        options["attn_implementation"] = "eager"
    target, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=target_dtype(), output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        # transformers fills them with random numbers.
        raise ValueError(
            f"target {path!r}: transformers misses {len(missing)} of its weights, {missing[0]} among them. If it is "
            "quantized in a way that vLLM alone reads, train with --hidden-from-engine, and evaluate on the target "
            "that it was quantized from."
        )
    _check_head(path, target)
    return target


def load_without_layers(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The target in `target_dtype` with its token embedding, final norm and LM head alone, for a training whose hidden
    states come from elsewhere. The weights of its layers are not read, and may be quantized.

    Raises ValueError as `load_target`, and if the embedding or the LM head is quantized.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    text.num_hidden_layers = 0
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None):
            setattr(text, name, [])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    verbosity = logging.get_verbosity()
    # It would warn of every weight that is not read.
    logging.set_verbosity_error()
    try:
        target, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=target_dtype(),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    modules = {name.rpartition(".")[0] for name in target.state_dict()}
    # A quantized matrix has parts with other names, such as its scales.
    parts = [name for name in found["unexpected_keys"] if name.rpartition(".")[0] in modules]
    if odd := sorted({*found["missing_keys"], *parts}):
        raise ValueError(
            f"target {path!r}: its token embedding or LM head is quantized or missing ({', '.join(odd)}). A drafter "
            "shares both, and they must be plain matrices. Use a checkpoint that leaves them as they are."
        )
    _check_head(path, target)
    return target


def check_target(path: str, trust_remote_code: bool = False) -> None:
    """Make the checks of `load_target` without loading weights. Raises ValueError."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        _check_head(path, AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _check_head(path: str, target: PreTrainedModel) -> None:
    head, embedding = target.get_output_embeddings(), target.get_input_embeddings()
    if head is None or embedding is None:
        raise ValueError(
            f"target {path!r} ({type(target).__name__}) has no LM head or no token embedding to share with a drafter. "
            "Use a decoder-only language model."
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"target {path!r} has an LM head with a bias, which drafters do not support yet.")
    width = target.config.get_text_config().hidden_size
    if {head.weight.shape[1], embedding.weight.shape[1]} != {width}:
        raise ValueError(
            f"target {path!r} has token embeddings of {embedding.weight.shape[1]} numbers and layers of {width}, which "
            "drafters do not support yet."
        )


def drafter_config(target: PretrainedConfig, **overrides: Any) -> CTCDrafterConfig:
    """The default drafter of a target: with the target's sizes, K/V shape and rotary base, its most frequent tokens
    (`num_frequent`), and three of its layers beside the last hidden state, where vLLM hands them out.

    overrides: fields of CTCDrafterConfig. Raises ValueError for an unknown one, or for a layer that the target lacks.
    """
    shape = target_shape(target)
    fields = {**dataclasses.asdict(shape), "draft_vocab_size": num_frequent(shape.vocab_size)}
    text = target.get_text_config()
    if "target_layers" not in overrides and hands_out_layers(target.architectures or ()):
        fields["target_layers"] = default_target_layers(text.num_hidden_layers)
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


def default_target_layers(num_layers: int) -> list[int]:
    """A low, a middle and a high layer, in the count of `CTCDrafterConfig.target_layers`; fewer in a small target.

    They are the layers that vLLM's EAGLE-3 reads by default.
    """
    return sorted({layer for layer in (2, num_layers // 2, num_layers - 3) if 0 < layer < num_layers})


DRAFT_VOCAB = "draft_vocab"
TARGET_LAYER_WEIGHTS = ("layer_norms.", "layers_proj.")
SHAPE_FIELDS = (
    "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "num_hidden_layers", "num_frames", "emission", "condition_rank", "has_blank",
)  # fmt: skip
"""Fields of CTCDrafterConfig that names and shapes of the weights depend on."""


@torch.no_grad()
def logit_multiplier(target: PreTrainedModel) -> float:
    """How many times the product of its last hidden state and its LM head the target's logits are: 1 but for a few
    families, such as Granite and Cohere, whose configs have different names for it.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=target.device)
    product = target.get_output_embeddings()(target.get_decoder()(token, use_cache=False).last_hidden_state).float()
    logits = target(token, use_cache=False).logits.float()
    return float((logits * product).sum() / product.square().sum())


def logits_of(target: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """A function from products of its last hidden states and its LM head to the target's logits, in float32."""
    cap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        return lambda product: cap * (product.float() / cap).tanh()
    multiplier = logit_multiplier(target)
    return lambda product: product.float() * multiplier


@torch.no_grad()
def start_like(drafter: CTCDrafter, target: PreTrainedModel) -> None:
    """Give the first logits of `drafter` the size of the target's.

    Its logits are products with the target's LM head alone, in training and in the engine; what the target multiplies
    them by becomes part of the drafter's weights. A drafter of Cohere would otherwise start 16 times too sure.
    """
    multiplier = logit_multiplier(target)
    drafter.norm.weight.mul_(multiplier)
    # Blank and gate read what the norm writes, and must stay what they are.
    if drafter.config.has_blank:
        drafter.blank.div_(multiplier)
    if drafter.config.emission == "conditioned":
        drafter.condition_gate.weight.div_(multiplier)


@torch.no_grad()
def start_from(drafter: CTCDrafter, folder: str | Path) -> None:
    """Copy into `drafter` the weights of the drafter in `folder`, which may read the target's last hidden state only.

    The projection of the layers that only `drafter` reads then starts at zero, so that both draft alike at first. Of
    the tokens that the other drafts, `drafter` drafts as many as its draft vocabulary has room for. Raises ValueError
    that names the setting in which the two differ.
    """
    other, config = check_drafter(str(folder)), drafter.config
    for field in ("target_layers", *SHAPE_FIELDS):
        theirs, ours = getattr(other, field), getattr(config, field)
        if theirs != ours and not (field == "target_layers" and not theirs):
            raise ValueError(
                f"--init {str(folder)!r}: that drafter has {field} {theirs}, this one {ours}. Give the same, or leave "
                "--init out."
            )
    weights = load_file(Path(folder) / WEIGHTS)
    own = {name: weight for name, weight in drafter.state_dict().items() if name != DRAFT_VOCAB}
    if config.target_layers and not other.target_layers:
        nn.init.zeros_(drafter.layers_proj.weight)
        own = {name: weight for name, weight in own.items() if not name.startswith(TARGET_LAYER_WEIGHTS)}
    for name, weight in own.items():
        weight.copy_(weights[name])
    if drafter.draft_vocab is not None and DRAFT_VOCAB in weights:
        theirs, every = weights[DRAFT_VOCAB], torch.arange(config.vocab_size)
        others = every[~torch.isin(every, theirs)]
        drafter.draft_vocab.copy_(torch.cat((theirs, others))[: len(drafter.draft_vocab)])
