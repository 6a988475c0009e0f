"""The rows of the target's LM head that the drafter drafts with, as vLLM holds them: each rank has a part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from vllm_ctc_spec.drafter.modeling import CTCDrafter


def draft_head(lm_head: Any, drafter: CTCDrafter) -> Callable[[Tensor], Tensor]:
    """[n, H] -> [n, K], for `emission_logits`.

    The plain product, which the drafter was trained with: some models scale or cap their logits after it.
    """
    drafted, every = drafter.draft_vocab, partial(_products, lm_head, drafter.config.vocab_size)
    if drafted is None:
        return every
    if not _is_plain(lm_head):
        return lambda hidden: every(hidden)[:, drafted]
    rows = head_rows(lm_head, drafter)[drafted]
    with rows.device:
        # Any number of ranks can share so many.
        padding = DEFAULT_VOCAB_PADDING_SIZE * get_tensor_model_parallel_world_size()
        own = ParallelLMHead(*rows.shape, params_dtype=rows.dtype, padding_size=padding)
    own.weight_loader(own.weight, rows)
    own.quant_method.process_weights_after_loading(own)
    return partial(_products, own, len(drafted))


def head_rows(lm_head: Any, drafter: CTCDrafter) -> Tensor:
    """[V, H], the LM head; of a quantized one what its product with each unit vector gives."""
    vocab_size = drafter.config.vocab_size
    if _is_plain(lm_head):
        return _of_all_ranks(lm_head, lm_head.weight.detach(), dim=0)[:vocab_size]
    weight = drafter.norm.weight
    units = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return _products(lm_head, vocab_size, units).T


def _products(lm_head: Any, num_rows: int, hidden: Tensor) -> Tensor:
    """[n, H] -> [n, num_rows]: what stands behind them is padding."""
    return _of_all_ranks(lm_head, lm_head.quant_method.apply(lm_head, hidden), dim=-1)[:, :num_rows]


def _of_all_ranks(lm_head: Any, part: Tensor, dim: int) -> Tensor:
    """`part` of each rank, one after the other along `dim`; as it is where each rank has all of the LM head."""
    return tensor_model_parallel_all_gather(part, dim) if lm_head.tp_size > 1 else part


def _is_plain(lm_head: Any) -> bool:
    return isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)


def find_lm_head(target: Any, drafter: CTCDrafter) -> Any:
    """Where it stands differs from model to model, so the target is asked for the logits of a row and watched.

    Raises ValueError if none is found.
    """
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
