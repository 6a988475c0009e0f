"""Engine options with a KV cache sized for known requests. vLLM's default takes most of the memory."""

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
"""Layers to reserve for a drafter's keys and values, each as large as one of the target's."""

ENGINE_BYTES = 1 << 30
"""Allowance for the memory of vLLM's processes beside weights and cache."""

MIN_MODEL_LEN = 1024

NUM_REQUESTS = 128
"""Default of the largest number of requests in flight."""


def kv_cache_options(target: str, num_requests: int, max_model_len: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """Options for `vllm.LLM` with a cache for `num_requests` requests of `max_model_len` tokens.

    target: folder or hub name. dtype: the engine's option; "auto" counts as 16 bits. Raises ValueError if main memory
    is too small for weights and cache; on a GPU vLLM checks that.
    """
    needed = _num_blocks([max_model_len] * num_requests) * _bytes_per_block(target, dtype)
    if not _fits(target, needed):
        raise _too_large(target, needed, num_requests, max_model_len)
    return _options(needed, num_requests, max_model_len)


def engine_options(
    target: str, lengths: Sequence[int], given: Mapping[str, Any], num_requests: int = NUM_REQUESTS
) -> dict[str, Any]:
    """Options for `vllm.LLM`: those `given` by the user, and defaults for the others.

    lengths: tokens of each request, prompt and answer together. num_requests: most requests in flight; it is halved
    until they fit into memory, unless `given` has `max_num_seqs`. Raises ValueError if a single request does not fit.
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
    # vLLM refuses a cache without room for one request of max_model_len tokens, so the longest request counts as one.
    # The others need additional slots for their drafts, which never exceed max_model_len.
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

    It is a power of two, because vLLM's compile cache depends on it, and engines for similar work should share that.
    """
    rounded = 1 << (max(longest + MAX_NODES, MIN_MODEL_LEN) - 1).bit_length()
    return min(rounded, context_length(target))


def context_length(target: str) -> int:
    """The target's `max_position_embeddings`."""
    return int(AutoConfig.from_pretrained(target).get_text_config().max_position_embeddings)


def _bytes_per_block(target: str, dtype: str) -> int:
    config = AutoConfig.from_pretrained(target)
    shape, num_layers = target_shape(config), config.get_text_config().num_hidden_layers + DRAFTER_LAYERS
    bytes_per_number = 4 if dtype in ("float32", "float") else 2
    return 2 * num_layers * shape.num_key_value_heads * shape.head_dim * bytes_per_number * BLOCK_SIZE


def _num_blocks(lengths: Sequence[int]) -> int:
    """Blocks for requests of these lengths, and one more, which vLLM reserves."""
    return 1 + sum(-(-length // BLOCK_SIZE) for length in lengths)


def _fits(target: str, cache: int) -> bool:
    # On a GPU vLLM checks this. Asking it for its free memory here would already take some of it.
    return torch.cuda.device_count() > 0 or cache + _weight_bytes(target) + ENGINE_BYTES <= _free_bytes()


def _weight_bytes(target: str) -> int:
    """Size of the weight files in a folder; 0 for a hub name, whose files may not be downloaded yet."""
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
        "Lower max_num_seqs (batch_sizes in a benchmark) or max_model_len, or close other programs."
    )


def _options(cache: int, num_requests: int, max_model_len: int) -> dict[str, Any]:
    return {
        "kv_cache_memory_bytes": cache,
        # The bytes above replace this share, but on a GPU vLLM still refuses to start if the share is not free.
        "gpu_memory_utilization": 0.01,
        "max_num_seqs": num_requests,
        "max_model_len": max_model_len,
    }
