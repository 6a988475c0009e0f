"""Which targets hand out the hidden states of their layers in vLLM."""

from __future__ import annotations

from collections.abc import Sequence


def hands_out_layers(architectures: Sequence[str]) -> bool:
    """Whether vLLM's class for the first of a target's `architectures` that it knows gives auxiliary hidden states.

    It does where the class has vLLM's interface SupportsEagle3 (vllm/model_executor/models/interfaces.py).
    """
    # Training needs nothing else of vLLM, whose import takes seconds.
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.model_executor.models.registry import ModelRegistry

    known = (ModelRegistry.models.get(name) for name in architectures)
    return any(bool(supports_eagle3(model.load_model_cls())) for model in list(filter(None, known))[:1])
