"""What each of vLLM's platforms asks of the engine's settings and of the target, checked before a worker starts."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from vllm_ctc_spec.ops.support import check_supported, check_xformers

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, ModelConfig, ParallelConfig

ATTENTION_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
FLOAT8_CACHES = ("fp8", "fp8_e4m3")
SMALLEST_BLOCK = 16
"""vLLM chooses a block size, if the user does not, that the attention backend takes: a multiple of this."""


def check_device(engine_args: Any, target: ModelConfig, parallel: ParallelConfig, attention_kernel: str) -> None:
    """Raises ValueError."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _check_cpu(engine_args, target, attention_kernel)
    elif current_platform.is_cuda():
        _check_cuda(engine_args, target, parallel, current_platform.get_device_capability(), attention_kernel)
    else:
        raise ValueError(
            f'speculative method "ctc" runs on vLLM\'s CPU and CUDA backends, not on '
            f"{current_platform.device_name!r}. Serve without speculative_config, or with another method."
        )


def _check_cpu(engine_args: Any, target: ModelConfig, attention_kernel: str) -> None:
    if attention_kernel != "own":
        raise ValueError(
            f"speculative_config attention_kernel={attention_kernel!r}: it needs a CUDA device, and this is vLLM for "
            f"CPU. Leave it out."
        )
    if engine_args.kv_cache_dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(
            f'kv_cache_dtype={engine_args.kv_cache_dtype!r}: speculative method "ctc" needs an unquantized cache on '
            f'CPU. Use "auto".'
        )
    if engine_args.block_size is not None and engine_args.block_size % 32:
        raise ValueError(
            f'block_size={engine_args.block_size}: speculative method "ctc" needs a multiple of 32 on CPU. Use 128.'
        )
    if target.get_head_size() % 32:
        raise ValueError(
            f'target {target.model!r} has head size {target.get_head_size()}; speculative method "ctc" needs a '
            f"multiple of 32 on CPU. Serve it without speculative_config."
        )


def _check_cuda(
    engine_args: Any,
    target: ModelConfig,
    parallel: ParallelConfig,
    capability: tuple[int, int] | None,
    attention_kernel: str,
) -> None:
    _check_attention_backend(engine_args)
    _check_graphs(engine_args.compilation_config)
    if engine_args.kv_cache_dtype in FLOAT8_CACHES:
        cache_dtype = torch.float8_e4m3fn
    elif engine_args.kv_cache_dtype in ("auto", "bfloat16", "float16"):
        named = engine_args.kv_cache_dtype
        cache_dtype = target.dtype if named == "auto" else getattr(torch, named)
    else:
        raise ValueError(
            f'kv_cache_dtype={engine_args.kv_cache_dtype!r}: speculative method "ctc" needs a cache of the model\'s '
            f'dtype or of float8 with one scale per layer. Use "auto" or "fp8".'
        )
    assert capability is not None
    check_supported(
        head_size=target.get_head_size(),
        num_heads=target.get_num_attention_heads(parallel),
        num_kv_heads=target.get_num_kv_heads(parallel),
        dtype=target.dtype,
        cache_dtype=cache_dtype,
        block_size=engine_args.block_size or SMALLEST_BLOCK,
        capability=(capability[0], capability[1]),
    )
    if attention_kernel == "xformers":
        check_xformers(target.get_head_size(), target.dtype, cache_dtype)


def _check_attention_backend(engine_args: Any) -> None:
    for chosen in (engine_args.attention_backend, engine_args.attention_config.backend):
        name = getattr(chosen, "name", chosen)
        if name is not None and name.upper() not in ATTENTION_BACKENDS:
            raise ValueError(
                f'attention backend {name}: speculative method "ctc" needs {" or ".join(ATTENTION_BACKENDS)}. '
                f"Set --attention-backend FLASH_ATTN."
            )


def _check_graphs(compilation: CompilationConfig) -> None:
    mode = compilation.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        raise ValueError(
            f'cudagraph_mode={mode.name}: speculative method "ctc" attends outside of CUDA graphs, because trees '
            f"change from step to step. Set cudagraph_mode to PIECEWISE, or leave it out."
        )


def with_piecewise_graphs(compilation: CompilationConfig) -> CompilationConfig:
    """A copy in which the user's silence about CUDA graphs means piecewise ones, which vLLM's own default is not."""
    from vllm.config import CUDAGraphMode

    compilation = copy.deepcopy(compilation)
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    return compilation
