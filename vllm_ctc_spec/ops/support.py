"""Checks at start-up whether the GPU kernels support a target, its cache and the GPU."""

from __future__ import annotations

from importlib.util import find_spec

import torch

MIN_CAPABILITY = (8, 0)
MIN_FP8_CAPABILITY = (8, 9)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
XFORMERS_HEAD_SIZES = (64, 128, 256)
REMEDY = "Serve without speculative_config, or with another method."


def check_supported(
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    block_size: int,
    capability: tuple[int, int],
) -> None:
    """Raises ValueError if the Triton kernels cannot run, ModuleNotFoundError if Triton is not installed.

    dtype: of queries, keys and values. cache_dtype: of the K/V cache; float8 dtypes for a float8 cache.
    capability: from `torch.cuda.get_device_capability`.
    """
    if find_spec("triton") is None:
        raise ModuleNotFoundError(
            'speculative method "ctc" needs Triton for its kernels on GPU, which is not installed. '
            "Install it with: pip install triton"
        )
    if capability < MIN_CAPABILITY:
        raise ValueError(
            f"the GPU has compute capability {_dotted(capability)}; tree attention needs "
            f"{_dotted(MIN_CAPABILITY)} or newer (Ampere). {REMEDY}"
        )
    if not 64 <= head_size <= 256 or head_size % 16:
        raise ValueError(f"head_size={head_size}: tree attention needs a multiple of 16 from 64 to 256. {REMEDY}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}. {REMEDY}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: tree attention needs bfloat16, float16 or float32. Set --dtype.")
    if cache_dtype != dtype and cache_dtype not in FP8_DTYPES:
        raise ValueError(
            f"kv_cache_dtype={cache_dtype} with dtype={dtype}: tree attention needs a cache of the model's dtype, "
            f'fp8_e4m3 or fp8_e5m2. Set kv_cache_dtype="auto".'
        )
    if cache_dtype in FP8_DTYPES and capability < MIN_FP8_CAPABILITY:
        raise ValueError(
            f"kv_cache_dtype={cache_dtype} needs compute capability {_dotted(MIN_FP8_CAPABILITY)} or newer, the GPU "
            f'has {_dotted(capability)}. Set kv_cache_dtype="auto".'
        )
    if block_size < 16 or block_size % 16:
        raise ValueError(f"block_size={block_size}: tree attention needs a multiple of 16. Set --block-size 16.")


def check_xformers(head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Raises ValueError if `ops.xformers` lacks what `check_supported` allows, ModuleNotFoundError without xformers."""
    if find_spec("xformers") is None:
        raise ModuleNotFoundError(
            "speculative_config attention_kernel='xformers' needs xformers, which is not installed. "
            "Install it with: pip install xformers"
        )
    lacks = {
        f"dtype={dtype}": dtype not in (torch.bfloat16, torch.float16),
        f"kv_cache_dtype={cache_dtype} with dtype={dtype}": cache_dtype != dtype,
        f"head_size={head_size}": head_size not in XFORMERS_HEAD_SIZES,
    }
    for what, is_lacking in lacks.items():
        if is_lacking:
            raise ValueError(
                f"{what}: speculative_config attention_kernel='xformers' needs bfloat16 or float16, a K/V cache of "
                f"the same dtype and a head size of {', '.join(map(str, XFORMERS_HEAD_SIZES))}. Leave it out."
            )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
