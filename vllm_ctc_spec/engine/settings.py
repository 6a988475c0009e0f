"""From what the user wrote to settings that are known to work, or one error at start-up."""

from __future__ import annotations

import dataclasses
import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vllm_ctc_spec.config import CTCDrafterConfig, SpecOptions, check_node_budget, goes_without_drafter
from vllm_ctc_spec.drafter.checkpoint import check_drafter
from vllm_ctc_spec.drafter.lookup import Hub, find_drafter
from vllm_ctc_spec.engine.devices import check_device
from vllm_ctc_spec.engine.target_layers import hands_out_layers
from vllm_ctc_spec.target_shape import target_shape

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

DEFAULT_NUM_NODES = 32
LIBRARY = "arctic_inference.suffix_decoding"


@dataclass(frozen=True)
class EngineSettings:
    """What the worker needs; travels to it inside `VllmConfig.additional_config["ctc_spec"]`."""

    drafter: str | None
    """None where trees are those of retrieval alone."""
    num_nodes: int
    options: SpecOptions
    target_layers: tuple[int, ...] = ()
    """Whose outputs the drafter reads; the target's compiled graph depends on them."""
    is_v2: bool = False
    """Whether vLLM's Model Runner V2 serves."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EngineSettings:
        layers = tuple(fields["target_layers"])
        options = SpecOptions(**fields["options"])
        return cls(fields["drafter"], fields["num_nodes"], options, layers, fields["is_v2"])


def resolve_settings(
    settings: dict[str, Any], engine_args: Any, target: ModelConfig, parallel: ParallelConfig
) -> EngineSettings:
    """Validate everything that can be known before a worker starts. Raises ValueError."""
    settings = dict(settings)
    is_undrafted = goes_without_drafter(settings)
    settings.pop("method", None)
    model, revision = settings.pop("model", None), settings.pop("revision", None)
    num_nodes = check_node_budget(settings.pop("num_speculative_tokens", DEFAULT_NUM_NODES))
    options = SpecOptions.from_dict(settings)
    _check_engine(engine_args, parallel)
    _check_target(target)
    if options.retrieval == "auto":
        options = dataclasses.replace(options, retrieval=_default_retrieval(target, options))
    elif options.retrieves:
        check_retrieval(options)
    drafter, layers = None, tuple[int, ...]()
    if not is_undrafted:
        drafter = find_drafter(model, target.model, revision, target.revision, hub_of(engine_args))
        config = check_drafter(drafter)
        layers = tuple(config.target_layers)
    check_device(engine_args, target, parallel, options.attention_kernel)
    if drafter is not None:
        _check_fit(config, drafter, target, parallel)
        drafter = os.path.abspath(drafter)
    runs_on_v2 = is_v2(target, options)
    if options.record is not None:
        # Last, because it makes the file.
        from vllm_ctc_spec.engine.recording import check_record

        options = dataclasses.replace(options, record=check_record(options.record))
    return EngineSettings(drafter, num_nodes, options, layers, runs_on_v2)


def is_v2(target: ModelConfig, options: SpecOptions) -> bool:
    """As vLLM chooses (`VllmConfig.use_v2_model_runner`), with what our runner of V2 cannot do.

    Raises ValueError where the user asks for V2 and for something that is not possible with it.
    """
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    lacking = {
        "attention_kernel='xformers'": options.attention_kernel == "xformers",
        "multimodal inputs": target.supports_multimodal_inputs,
        f"retrieval={options.retrieval!r}": options.retrieves,
        "return_sampling_mask": target.return_sampling_mask,
        "enable_trace_replay": target.enable_trace_replay,
    }
    present = [setting for setting, is_set in lacking.items() if is_set]
    chosen: bool | None = envs.VLLM_USE_V2_MODEL_RUNNER
    if chosen and present:
        raise ValueError(
            f'VLLM_USE_V2_MODEL_RUNNER=1 with {present[0]}: speculative method "ctc" does this with vLLM\'s V1 runner '
            "alone. Unset VLLM_USE_V2_MODEL_RUNNER."
        )
    if chosen is None:
        return bool(current_platform.is_cuda()) and HAS_TRITON and not present
    return chosen


def _default_retrieval(target: ModelConfig, options: SpecOptions) -> Literal["off", "request"]:
    """On where it is installed and nothing else has to change for it."""
    if options.tree != "prefix" or is_v2(target, options) or _library_fault() is not None:
        return "off"
    return "request"


def _library_fault() -> ImportError | None:
    """Why the library of retrieval's suffix trees cannot be imported; None if it can."""
    try:
        importlib.import_module(LIBRARY)
    except ImportError as error:
        return error
    return None


def check_retrieval(options: SpecOptions) -> None:
    """Raises ValueError where the library of its suffix trees is missing."""
    fault = _library_fault()
    if fault is not None:
        raise ValueError(
            f"speculative_config retrieval={options.retrieval!r} needs arctic-inference, which cannot be imported "
            f'({fault}). Install it with: pip install "vllm-ctc-spec[suffix]"'
        ) from fault


def hub_of(engine_args: Any) -> Hub:
    """Where vLLM keeps what it downloads, and its token."""
    return Hub(engine_args.download_dir, engine_args.hf_token)


def _check_engine(engine_args: Any, parallel: ParallelConfig) -> None:
    if parallel.worker_cls != "auto":
        raise ValueError(
            f'--worker-cls {parallel.worker_cls!r}: speculative method "ctc" brings its own worker. Remove it.'
        )
    for setting in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, setting)
        if size > 1:
            raise ValueError(
                f'{setting}={size}: speculative method "ctc" needs 1. Use tensor_parallel_size or data_parallel_size.'
            )
    if parallel.enable_dbo:
        raise ValueError('enable_dbo: speculative method "ctc" verifies a step in one piece. Remove --enable-dbo.')
    for setting in ("kv_transfer_config", "kv_offloading_size"):
        if getattr(engine_args, setting) is not None:
            _refuse_connector(setting)


def check_final(config: VllmConfig) -> None:
    """What is known of vLLM's config in the worker only: vLLM and plugins change it after our settings were checked."""
    if config.kv_transfer_config is not None:
        _refuse_connector(f"KV connector {config.kv_transfer_config.kv_connector}")

    ours = EngineSettings.from_dict(config.additional_config["ctc_spec"])
    if config.use_v2_model_runner != ours.is_v2:
        runner = "V2" if config.use_v2_model_runner else "V1"
        raise ValueError(
            f"vLLM chooses Model Runner {runner}, because of a setting such as watermark_config, and speculative "
            'method "ctc" serves this deployment with the other one. Remove the setting, or speculative_config.'
        )


def _refuse_connector(setting: str) -> None:
    raise ValueError(
        f'{setting}: speculative method "ctc" moves keys and values after verification, which a KV connector does not '
        "see. Remove one of the two."
    )


def _check_target(target: ModelConfig) -> None:
    unsupported = {
        "multi-head latent attention (MLA)": target.use_mla,
        "hybrid or state-space (mamba) layers": target.is_hybrid or target.is_attention_free,
        "M-RoPE positions": target.uses_mrope,
        "an encoder": target.is_encoder_decoder,
        "images whose tokens see one another (--language-model-only turns them off)": target.is_mm_prefix_lm,
        "chunked local attention": target.attention_chunk_size is not None,
        "ALiBi positions": target.uses_alibi,
        "a pooling task instead of generation": target.runner_type != "generate",
    }
    for what, present in unsupported.items():
        if present:
            raise ValueError(
                f'target {target.model!r} has {what}, which speculative method "ctc" does not support. '
                f"Serve it without speculative_config, or with another method."
            )


def _check_fit(config: CTCDrafterConfig, drafter: str, target: ModelConfig, parallel: ParallelConfig) -> None:
    shape = target_shape(target.hf_text_config)
    for name in ("hidden_size", "vocab_size", "num_key_value_heads", "head_dim"):
        ours, theirs = getattr(config, name), getattr(shape, name)
        if ours != theirs:
            raise ValueError(
                f"drafter {drafter!r} has {name} {ours}, but the target {target.model!r} has {theirs}: "
                f"it was trained for another target. Train a drafter for this one."
            )
    num_ranks = parallel.tensor_parallel_size
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % num_ranks:
            raise ValueError(
                f"tensor_parallel_size={num_ranks}: drafter {drafter!r} has {name} {getattr(config, name)}, which "
                "so many ranks cannot share. Set a tensor_parallel_size that divides it."
            )
    num_layers = target.hf_text_config.num_hidden_layers
    if beyond := [layer for layer in config.target_layers if layer >= num_layers]:
        raise ValueError(
            f"drafter {drafter!r} reads layer {beyond[0]} of the target, but the target {target.model!r} has "
            f"{num_layers} layers: it was trained for another target. Train a drafter for this one."
        )
    if config.target_layers and not hands_out_layers([target.architecture]):
        raise ValueError(
            f"drafter {drafter!r} reads layers {config.target_layers} of the target, but vLLM's {target.architecture} "
            "gives the last only. Train a drafter with `vllm-ctc-spec train fit --target-layers none`."
        )
