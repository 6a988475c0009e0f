"""LoRA adapters, which the drafter ignores: it drafts with the target's own embedding and LM head."""

from __future__ import annotations

import copy
from typing import Any

from vllm.lora.layers import BaseLayerWithLoRA


def without_adapters(module: Any) -> Any:
    """`module` with the base layer in place of each of vLLM's LoRA layers: a copy that shares all weights, or `module`
    itself if it has none.

    A LoRA layer looks up its adapters by the rows of the target's last step, and drafting has other rows.
    """
    if isinstance(module, BaseLayerWithLoRA):
        return module.base_layer
    children = {name: None if child is None else without_adapters(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    bare = copy.copy(module)
    bare._modules = children
    return bare
