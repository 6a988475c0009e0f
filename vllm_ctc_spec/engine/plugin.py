"""vLLM's entry point: makes `speculative_config={"method": "ctc", ...}` known to stock vLLM.

Ledger of what is replaced in vLLM, why, and when it can go:

* `EngineArgs.create_speculative_config`: translates our method to vLLM's "custom_class" with our worker.
  Goes when vLLM lets a plugin register a speculative method.
* `EngineArgs.add_cli_args`: `--speculative-model` as another name of `--spec-model`, as earlier versions of vLLM call
  it. Goes when nobody writes it any more.
* `SamplingParams._validate_spec_decode`: vLLM refuses min_p and logit_bias with any speculation, because its
  rejection sampler ignores them; our walk runs vLLM's own sampler at every node and honours them.
  Goes when the check asks the method.
* `caching.aot_compile_hash_factors` and `decorators._try_load_aot_compiled_fn`, on a CPU, with any method and none:
  vLLM cannot load a target that it compiled at an earlier start (see compile_cache.py).
  Goes when vLLM's CPU backend loads it and its key has the processor and the number of threads.
* `gpu_model_runner.build_logitsprocs` (in the worker, see logits_processors.py): with any speculation vLLM loads no
  logits processors but min_tokens. Goes with the check of `_validate_spec_decode`.
* `gpu_input_batch.maybe_create_thinking_budget_state_holder` (in the worker, see thinking_budgets.py): with any
  speculation vLLM counts for its rejection sampler. Goes when the sampler is told in which rows it is asked.
* `cpu_worker.CPUModelRunner` (in the worker, see cpu_worker.py): our model runner, which the CPU's worker has no method
  to choose. Goes when it has `_make_model_runner`, as the GPU's has.
* `VllmConfig._get_v2_model_runner_unsupported_features`: Model Runner V2 refuses "custom_class".
  Goes when vLLM lets a plugin register a speculator.
* `VllmConfig.__post_init__`, with Model Runner V2: vLLM schedules asynchronously with methods that it knows by name.
  An adaptive node budget then gets a scheduler class of ours (v2/scheduler.py), by vLLM's own setting.
  Goes when the check asks the method.
* `gpu.model_runner.init_speculator` and `cpu.model_runner.CPUModelRunner` (in the worker, with Model Runner V2): our
  speculator and runner. Go with the former.
* `ModelState.prepare_attn` of the runner's own state, with Model Runner V2: rows of trees are added to attention's
  metadata. Goes when vLLM's runner has a hook after it.
* The attention backends CPU_ATTN, FLASH_ATTN and TRITON_ATTN (in the worker, by vLLM's `register_backend`): rows of
  trees go to our kernels. Goes when vLLM's backends take an ancestor mask.
* `AsyncLLM.__init__` and `LLMEngine.__init__`, where `record` is set: the engine's output processor tells us of each
  request that has ended (see recording.py). Goes when vLLM hands the tokens of finished requests to a plugin.
* `WorkerWrapperBase.init_device`, on a CPU, with any method and none: Linux kills a process that uses AMX's tiles
  without having asked for them, as vLLM's attention does where no product of the target is large enough for oneDNN,
  which asks. Goes when vLLM asks.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.engine.compat import require_supported_vllm, supports_installed_vllm

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

    from vllm_ctc_spec.engine.settings import EngineSettings

METHOD = "ctc"
PROPOSER = "vllm_ctc_spec.engine.drafting.CTCProposer"
WITHOUT_DRAFTER = "vllm_ctc_spec.engine.proposer.TargetProposer"
WORKERS = {
    "cpu": "vllm_ctc_spec.engine.cpu_worker.CTCCPUWorker",
    "cuda": "vllm_ctc_spec.engine.worker.CTCGPUWorker",
}
"""By vLLM's device type; `resolve_settings` refuses other platforms."""
V2_WORKERS = {
    "cpu": "vllm_ctc_spec.engine.v2.cpu_worker.CTCCPUWorkerV2",
    "cuda": "vllm_ctc_spec.engine.v2.worker.CTCGPUWorkerV2",
}
"""Of Model Runner V2."""
EXECUTOR = "vllm_ctc_spec.engine.executor.CTCExecutor"
SCHEDULER = "vllm_ctc_spec.engine.v2.scheduler.CTCScheduler"


def is_ctc(speculative_config: SpeculativeConfig | None) -> bool:
    return speculative_config is not None and speculative_config.model in (PROPOSER, WITHOUT_DRAFTER)


def register() -> None:
    """Entry point `vllm.general_plugins`; runs in every process, any number of times."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

    _replace_once(EngineArgs, "create_speculative_config", _create_speculative_config)
    _replace_once(VllmConfig, "_get_v2_model_runner_unsupported_features", _unsupported_by_v2)
    _replace_once(VllmConfig, "__post_init__", _decide_on_async_scheduling)
    _replace_once(EngineArgs, "add_cli_args", _add_cli_args)
    _replace_once(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
    logging.getLogger("vllm.config.scheduler").addFilter(_is_not_about_our_scheduler)
    if supports_installed_vllm():
        _mend_cpu_engines()


def _mend_cpu_engines() -> None:
    from vllm.compilation import caching, decorators
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from vllm_ctc_spec.engine import compile_cache

    if current_platform.is_cpu():
        _replace_once(caching, "aot_compile_hash_factors", compile_cache.hash_factors)
        _replace_once(decorators, "_try_load_aot_compiled_fn", compile_cache.load)
        _replace_once(WorkerWrapperBase, "init_device", _ask_for_amx)


def _ask_for_amx(original: Any, self: Any) -> None:
    import torch

    # torch has no public name for it. It does nothing on processors without AMX.
    init_amx = getattr(torch.cpu, "_init_amx", None)
    if init_amx is not None:
        init_amx()
    original(self)


def _replace_once(owner: Any, name: str, replacement: Any) -> None:
    original = getattr(owner, name, None)
    # A vLLM without the attribute is one that we do not support; it stays usable without our method.
    if original is None or getattr(original, "_ctc_spec", False):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapper._ctc_spec = True  # type: ignore[attr-defined]
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)


def _add_cli_args(original: Any, parser: Any) -> Any:
    parser = original(parser)
    # A vLLM that has it keeps its own.
    with suppress(argparse.ArgumentError):
        parser.add_argument(
            "--speculative-model",
            dest="spec_model",
            help="Another name of --spec-model. ctc-drafter is the CTC drafter that belongs to the target.",
        )
    return parser


def _validate_spec_decode(original: Any, self: Any, speculative_config: SpeculativeConfig | None) -> None:
    if not is_ctc(speculative_config):
        original(self, speculative_config)


def _unsupported_by_v2(original: Any, self: Any) -> list[str]:
    features: list[str] = original(self)
    if _settings_on_v2(self) is not None:
        features = [feature for feature in features if "custom_class" not in feature]
    return features


def _settings_on_v2(config: VllmConfig) -> EngineSettings | None:
    """None for other methods, and on V1."""
    if not is_ctc(config.speculative_config):
        return None
    from vllm_ctc_spec.engine.settings import EngineSettings

    settings = EngineSettings.from_dict(config.additional_config["ctc_spec"])
    return settings if settings.is_v2 else None


def _decide_on_async_scheduling(original: Any, self: Any) -> None:
    """Whether to schedule asynchronously stays vLLM's decision; it knows which methods can be by their names alone.

    An adaptive node budget then takes a scheduler of ours.
    """
    settings = _settings_on_v2(self)
    if settings is None:
        return original(self)
    from vllm.config import vllm as module

    names = module.NgramGPUTypes
    module.NgramGPUTypes = Literal["custom_class"]
    try:
        original(self)
    finally:
        module.NgramGPUTypes = names
    scheduler = self.scheduler_config
    if scheduler.async_scheduling and settings.options.adapts:
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(
                f'scheduler_cls={scheduler.scheduler_cls!r}: speculative method "ctc" with an adaptive node budget has '
                "an asynchronous scheduler of its own. Remove scheduler_cls, set adaptive_budget to false, or turn "
                "async_scheduling off."
            )
        scheduler.scheduler_cls = SCHEDULER


def _create_speculative_config(
    original: Any, self: Any, target_model_config: Any, target_parallel_config: Any
) -> SpeculativeConfig | None:
    settings = _merged_settings(self)
    # vLLM itself refuses a key that is given twice.
    if settings is None or not _asks_for_ctc(settings, self):
        return original(self, target_model_config, target_parallel_config)
    require_supported_vllm()
    from vllm.platforms import current_platform

    from vllm_ctc_spec.engine.devices import with_piecewise_graphs
    from vllm_ctc_spec.engine.settings import resolve_settings

    resolved = resolve_settings(settings, self, target_model_config, target_parallel_config)
    if resolved.options.record is not None:
        _record_answers()
    self.additional_config = {**(self.additional_config or {}), "ctc_spec": resolved.to_dict()}
    as_written = (self.speculative_config, self.spec_method, self.spec_model, self.spec_tokens)
    self.speculative_config = {
        "method": "custom_class",
        "model": WITHOUT_DRAFTER if resolved.drafter is None else PROPOSER,
        "num_speculative_tokens": resolved.num_nodes,
    }
    self.spec_method = self.spec_model = self.spec_tokens = None
    workers = V2_WORKERS if resolved.is_v2 else WORKERS
    target_parallel_config.worker_cls = workers[current_platform.device_type]
    if current_platform.is_cpu() and not resolved.is_v2 and _has_process_per_worker(target_parallel_config):
        target_parallel_config.distributed_executor_backend = EXECUTOR
    if current_platform.is_cuda():
        self.compilation_config = with_piecewise_graphs(self.compilation_config)
    proposers = logging.getLogger("vllm.config.speculative")
    proposers.addFilter(_is_not_about_classes)
    try:
        return original(self, target_model_config, target_parallel_config)
    finally:
        proposers.removeFilter(_is_not_about_classes)
        # One EngineArgs may make several configs, and each must see what the user wrote.
        self.speculative_config, self.spec_method, self.spec_model, self.spec_tokens = as_written


def _record_answers() -> None:
    # Here, because other processes than those that make an engine need none of these modules.
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_ctc_spec.engine.recording import with_recording

    for engine in (AsyncLLM, LLMEngine):
        _replace_once(engine, "__init__", with_recording)


def _is_not_about_classes(record: logging.LogRecord) -> bool:
    """vLLM warns of proposers that a user wrote against its interface; the version check answers for ours."""
    return "custom class-based proposer" not in record.getMessage()


def _is_not_about_our_scheduler(record: logging.LogRecord) -> bool:
    """In the engine core vLLM warns of every scheduler class that is not its own."""
    return SCHEDULER not in record.getMessage()


def _has_process_per_worker(parallel: Any) -> bool:
    """As vLLM's CPU platform decides it (vllm/platforms/cpu.py)."""
    from vllm import envs

    backend = parallel.distributed_executor_backend
    return backend == "mp" or (backend == "uni" and envs.VLLM_ENABLE_V1_MULTIPROCESSING)


def _merged_settings(engine_args: Any) -> dict[str, Any] | None:
    """`--speculative-config` and --spec-method, --spec-model, --spec-tokens; None if both have the same key.

    Raises ValueError where the former is no object with names for keys.
    """
    given = engine_args.speculative_config or {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(
            f"speculative_config={given!r}: give an object whose keys are strings, such as "
            '{"method": "ctc", "model": "path/to/drafter"}.'
        )
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    shorthands = {
        "method": engine_args.spec_method,
        "model": engine_args.spec_model,
        "num_speculative_tokens": engine_args.spec_tokens,
    }
    for key, value in shorthands.items():
        if value is not None:
            if key in settings:
                return None
            settings[key] = value
    return settings


def _asks_for_ctc(settings: dict[str, Any], engine_args: Any) -> bool:
    """Raises ValueError where the method is misspelt, or another one's and has our options."""
    method, model = settings.get("method"), settings.get("model")
    if method == METHOD:
        return True
    if method is None and model is not None:
        from vllm_ctc_spec.drafter.lookup import names_a_drafter
        from vllm_ctc_spec.engine.settings import hub_of

        if names_a_drafter(model, settings.get("revision"), hub_of(engine_args)):
            return True
    if isinstance(method, str) and method.lower() == METHOD:
        raise ValueError(f"speculative_config method={method!r}: write {METHOD!r}.")
    if ours := sorted(settings.keys() & set(SpecOptions.names())):
        raise ValueError(
            f"speculative_config {ours[0]}={settings[ours[0]]!r} is an option of method {METHOD!r}, and the method is "
            f"{method!r}. Set 'method' to {METHOD!r}, or leave {ours[0]!r} out."
        )
    return False
