"""Compiled targets on a CPU: vLLM keeps them at the first start; with this module it loads them at the next.

vLLM compiles a target ahead of time and keeps the result in VLLM_CACHE_ROOT/torch_compile_cache/torch_aot_compile. On a
CPU it leaves this to torch's inductor, and vLLM 0.32 cannot load what it kept: it calls `finalize_loading`, which only
artifacts of its own compiler have, takes the AttributeError for a broken file and compiles again.

The code that is loaded is the code that the first start ran, so results do not change. This needs a key of all that the
code depends on, and vLLM's lacks some of it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PLACEMENT = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")
"""Of the environment, what says on which cores an engine runs: of this the code depends on their number only."""


def hash_factors(original: Any, vllm_config: VllmConfig) -> list[Any]:
    """The key of a compiled target, in place of vLLM's `aot_compile_hash_factors`."""
    from vllm import envs
    from vllm.platforms import current_platform

    # The first is the environment's.
    _, *factors = original(_of_target(vllm_config))
    environment = {name: value for name, value in envs.compile_factors().items() if name not in PLACEMENT}
    return [
        sorted(environment.items()),
        *factors,
        # Which of its kernels vLLM calls.
        type(current_platform).__name__,
        envs.VLLM_ZENTORCH_WEIGHT_PREPACK,
        # Generated C++ has one vector width, is built for one processor, and has no parallel loops for one thread.
        sorted(torch.cpu.get_capabilities().items()),
        torch.get_num_threads(),
    ]


def _of_target(vllm_config: VllmConfig) -> VllmConfig:
    """Our method changes nothing in the target's graph but that it returns the layers which the drafter reads: drafters
    of the same layers share a compiled target, and those of the last alone share plain vLLM's.
    """
    target = copy.copy(vllm_config)
    # Follows the method, and there is no NCCL.
    target.parallel_config = copy.copy(vllm_config.parallel_config)
    target.parallel_config.disable_nccl_for_dp_synchronization = True
    additional = vllm_config.additional_config
    if isinstance(additional, dict) and "ctc_spec" in additional:
        target.speculative_config = None
        layers = additional["ctc_spec"]["target_layers"]
        others = {name: value for name, value in additional.items() if name != "ctc_spec"}
        target.additional_config = others | ({"target_layers": list(layers)} if layers else {})
    return target


def load(original: Any, model: Any, path: str) -> Any:
    """In place of vLLM's `_try_load_aot_compiled_fn`; None if there is nothing to load."""
    if not hasattr(BundledAOTAutogradSerializableCallable, "finalize_loading"):
        BundledAOTAutogradSerializableCallable.finalize_loading = _is_complete  # type: ignore[attr-defined]
    # Libraries that are gone are built again with the first start's options, among which vLLM keeps its guard filter.
    options = dict(model.compilation_config.inductor_compile_config)
    options.pop("guard_filter_fn", None)
    with torch._inductor.config.patch(options):
        return original(model, path)


def _is_complete(self: BundledAOTAutogradSerializableCallable, vllm_config: VllmConfig) -> None:
    """Torch's artifact can be called once it is read."""
