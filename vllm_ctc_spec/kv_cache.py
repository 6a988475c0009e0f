"""The KV cache that the work at hand needs, in place of the 92 % of the machine's memory that vLLM takes by default."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from vllm_ctc_spec.config import MAX_NODES
from vllm_ctc_spec.target_shape import target_shape

BLOCK_SIZE = 128
"""Tokens of a cache block on vLLM's CPU backend; on CUDA blocks are smaller."""

DRAFTER_LAYERS = 4
"""Layers of the target's kind for which a drafter's keys and values have room."""

ENGINE_BYTES = 1 << 30
"""Allowance for what vLLM's processes hold beside weights and cache."""

SMALLEST_MODEL_LEN = 1024

NUM_REQUESTS = 128
"""Requests in flight at most, where the user names no number."""


def kv_cache_options(target: str, num_requests: int, max_model_len: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """Options for `vllm.LLM`, with which `num_requests` requests of `max_model_len` tokens fit into the cache.

    target: folder or hub name. dtype: what the engine is told; "auto" counts as 16 bits. Raises ValueError where main
    memory is too small for weights and cache; a GPU's memory is vLLM's to check.
    """
    needed = _num_blocks([max_model_len] * num_requests) * _bytes_per_block(target, dtype)
    if not _fits(target, needed):
        raise _too_large(target, needed, num_requests, max_model_len)
    return _options(needed, num_requests, max_model_len)


def engine_options(
    target: str, lengths: Sequence[int], given: Mapping[str, Any], num_requests: int = NUM_REQUESTS
) -> dict[str, Any]:
    """`given`, the user's options for `vllm.LLM`, and those that they leave open, for requests of `lengths` tokens.

    lengths: prompt and answer of each request together. At most `num_requests` of them are in flight, fewer where
    memory is short and the user has not named `max_num_seqs`. Raises ValueError where not even that fits.
    """
    for key in ("max_model_len", "max_num_seqs"):
        number = given.get(key)
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"{key}={number!r}: use a positive integer.")
    max_model_len = given.get("max_model_len") or fitting_model_len(target, max(lengths))
    num_requests = given.get("max_num_seqs", min(num_requests, len(lengths)))
    if {"kv_cache_memory_bytes", "gpu_memory_utilization"} & given.keys() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {"max_num_seqs": num_requests, "max_model_len": max_model_len, **given}
    bytes_per_block = _bytes_per_block(target, str(given.get("dtype", "auto")))
    # vLLM refuses a cache in which no request of max_model_len tokens fits, so one of these is counted as so long.
    # It keeps slots for drafts behind each request, and drafts nothing beyond max_model_len.
    longest = [max_model_len, *(min(n + MAX_NODES, max_model_len) for n in sorted(lengths, reverse=True)[1:])]
    needed = _num_blocks(longest[:num_requests]) * bytes_per_block
    while not _fits(target, needed):
        if "max_num_seqs" in given or num_requests == 1:
            raise _too_large(target, needed, num_requests, max_model_len)
        num_requests //= 2
        needed = _num_blocks(longest[:num_requests]) * bytes_per_block
    return {**_options(needed, num_requests, max_model_len), **given}


def fitting_model_len(target: str, longest: int) -> int:
    """`max_model_len` for requests of up to `longest` tokens and their drafts.

    A power of two: vLLM's compile cache is one for each, and the engines of similar work shall share it.
    """
    rounded = 1 << (max(longest + MAX_NODES, SMALLEST_MODEL_LEN) - 1).bit_length()
    return min(rounded, context_length(target))


def context_length(target: str) -> int:
    """Tokens that the target's positions reach."""
    return int(AutoConfig.from_pretrained(target).get_text_config().max_position_embeddings)


def _bytes_per_block(target: str, dtype: str) -> int:
    config = AutoConfig.from_pretrained(target)
    shape, num_layers = target_shape(config), config.get_text_config().num_hidden_layers + DRAFTER_LAYERS
    bytes_per_number = 4 if dtype in ("float32", "float") else 2
    return 2 * num_layers * shape.num_key_value_heads * shape.head_dim * bytes_per_number * BLOCK_SIZE


def _num_blocks(lengths: Sequence[int]) -> int:
    """vLLM keeps one block for itself."""
    return 1 + sum(-(-length // BLOCK_SIZE) for length in lengths)


def _fits(target: str, cache: int) -> bool:
    # A GPU's free memory cannot be asked for without taking some of it.
    return torch.cuda.device_count() > 0 or cache + _weight_bytes(target) + ENGINE_BYTES <= _free_bytes()


def _weight_bytes(target: str) -> int:
    """Of the files in a folder; 0 for a hub name, whose files may not be there yet."""
    folder = Path(target)
    files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    return sum(path.stat().st_size for path in files)


def _free_bytes() -> int:
    return int(psutil.virtual_memory().available)


def _too_large(target: str, cache: int, num_requests: int, max_model_len: int) -> ValueError:
    weights = _weight_bytes(target)
    return ValueError(
        f"max_num_seqs={num_requests} requests of up to max_model_len={max_model_len} tokens need "
        f"{(cache + weights + ENGINE_BYTES) / 1e9:.1f} GB of memory (KV cache {cache / 1e9:.1f}, weights "
        f"{weights / 1e9:.1f}, vLLM itself {ENGINE_BYTES / 1e9:.1f}), and {_free_bytes() / 1e9:.1f} GB are free. "
        "Lower max_num_seqs (batch_sizes in a benchmark) or max_model_len, or end other programs."
    )


def _options(cache: int, num_requests: int, max_model_len: int) -> dict[str, Any]:
    return {
        "kv_cache_memory_bytes": cache,
        # On a GPU vLLM refuses to start where this share of its memory is not free, though the bytes above replace it.
        "gpu_memory_utilization": 0.01,
        "max_num_seqs": num_requests,
        "max_model_len": max_model_len,
    }
