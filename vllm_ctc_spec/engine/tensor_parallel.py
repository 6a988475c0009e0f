"""The drafter and the trees on the ranks of vLLM's tensor parallelism.

Every rank runs the target's sampler on the same logits, and so every rank walks. The trees that it walks, and whether
a step drafts at all, are those of the first rank: what two ranks compute need not be the same to the last bit, and what
they measure never is.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

from vllm_ctc_spec.drafter.modeling import CTCDrafter

Value = TypeVar("Value")


def of_first_rank(value: Value) -> Value:
    """The first rank's `value` on every rank, all of which must call it; `value` can be pickled."""
    first: Value = get_tp_group().broadcast_object(value)
    return first


def is_first_rank() -> bool:
    first: bool = get_tp_group().is_first_rank
    return first


def split_layers(drafter: CTCDrafter) -> None:
    """Leave each rank its share of the heads and of the MLP in the drafter's layers, as of the target's.

    Each rank has all of the rest: it is small, or one product per token, as `fc` in vLLM's EAGLE, also not split.
    """
    num_ranks = get_tensor_model_parallel_world_size()
    if num_ranks == 1:
        return
    copies = max(num_ranks // drafter.config.num_key_value_heads, 1)
    for layer in cast(Any, drafter.layers):
        layer.q_proj = _loaded(ColumnParallelLinear, layer.q_proj.weight)
        for name in ("k_proj", "v_proj"):
            # Of fewer key-value heads than ranks each has copies, one for each rank whose query heads need it.
            heads = getattr(layer, name).weight.unflatten(0, (-1, drafter.config.head_dim))
            setattr(layer, name, _loaded(ColumnParallelLinear, heads.repeat_interleave(copies, 0).flatten(0, 1)))
        layer.o_proj = _loaded(RowParallelLinear, layer.o_proj.weight)
        halves = [drafter.config.intermediate_size] * 2
        layer.gate_up_proj = _loaded(MergedColumnParallelLinear, layer.gate_up_proj.weight, halves)
        layer.down_proj = _loaded(RowParallelLinear, layer.down_proj.weight)


def _loaded(kind: type[Any], weight: Tensor, output_size: int | list[int] | None = None) -> Any:
    """One of vLLM's linear layers with this rank's part of `weight` [output, input].

    output_size: where it is not `weight`'s, those of the parts that the layer splits by themselves.
    """
    outputs, inputs = weight.shape
    with weight.device:
        layer = kind(inputs, output_size or outputs, bias=False, params_dtype=weight.dtype, return_bias=False)
    layer.weight.weight_loader(layer.weight, weight)
    layer.quant_method.process_weights_after_loading(layer)
    return layer
