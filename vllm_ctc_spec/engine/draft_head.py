"""The rows of the target's LM head that the drafter drafts with, as vLLM holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_ctc_spec.drafter.modeling import CTCDrafter


def draft_head(target: Any, drafter: CTCDrafter) -> Callable[[Tensor], Tensor]:
    """[n, H] -> [n, K], for `emission_logits`.

    The plain product, which the drafter was trained with: some models scale or cap their logits after it.
    """
    lm_head = _lm_head(target, drafter)
    method, drafted = lm_head.quant_method, drafter.draft_vocab

    def every(hidden: Tensor) -> Tensor:
        # What stands behind the vocabulary is padding.
        logits: Tensor = method.apply(lm_head, hidden)[:, : drafter.config.vocab_size]
        return logits

    if drafted is None:
        return every
    if not _is_plain(lm_head):
        return lambda hidden: every(hidden)[:, drafted]
    rows, own_method = nn.Module(), UnquantizedEmbeddingMethod()
    rows.weight = nn.Parameter(lm_head.weight.detach()[drafted], requires_grad=False)
    own_method.process_weights_after_loading(rows)
    return lambda hidden: own_method.apply(rows, hidden)


def head_rows(target: Any, drafter: CTCDrafter) -> Tensor:
    """[V, H], the target's LM head; of a quantized one what its product with each unit vector gives."""
    lm_head, vocab_size = _lm_head(target, drafter), drafter.config.vocab_size
    if _is_plain(lm_head):
        return lm_head.weight.detach()[:vocab_size]
    weight = drafter.norm.weight
    units = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    products: Tensor = lm_head.quant_method.apply(lm_head, units)
    return products[:, :vocab_size].T


def _is_plain(lm_head: Any) -> bool:
    return isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)


def _lm_head(target: Any, drafter: CTCDrafter) -> Any:
    """Where it stands differs from model to model, so the target is asked for the logits of a row and watched."""
    hidden = torch.zeros_like(drafter.norm.weight)[None]
    seen: list[nn.Module] = []
    processors = [module for module in target.modules() if isinstance(module, LogitsProcessor)]
    hooks = [module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for module in processors]
    try:
        target.compute_logits(hidden)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(
            f"target {type(target).__name__} computes its logits without vLLM's LogitsProcessor, so speculative method "
            '"ctc" finds no LM head to draft with. Serve it without speculative_config, or with another method.'
        )
    return seen[0]
