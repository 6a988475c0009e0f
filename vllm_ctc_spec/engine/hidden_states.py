"""Hidden states of whole texts by a vLLM engine: of quantized targets, on several devices.

The engine pools: vLLM's runner "pooling" returns the last hidden state, after the final norm, of each token of a
prompt, in whatever steps it computed them. We add the outputs of layers beside it. vLLM's own speculative method
"extract_hidden_states" returns layers alone, before the final norm, in a file for each request, and its connector
copies with CUDA streams, which a CPU does not have (vllm/distributed/kv_transfer/kv_connector/v1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import PoolerConfig

from vllm_ctc_spec.engine.lifetime import started

TASK = "token_embed"
SET_HERE: dict[str, Any] = {
    "runner": "pooling",
    "convert": "embed",
    # The activation would scale each state to length 1.
    "pooler_config": PoolerConfig(task=TASK, seq_pooling_type="LAST", tok_pooling_type="ALL", use_activation=False),
    # A compiled model would not notice which layers are chosen once it has started.
    "enforce_eager": True,
    # Positions that are read from a cache have no hidden states.
    "enable_prefix_caching": False,
    "speculative_config": None,
    "worker_extension_cls": f"{__name__}.LayersBeside",
}
"""Options of `vllm.LLM`."""


class LayersBeside:
    """Runs in vLLM's workers (`worker_extension_cls`)."""

    get_model: Callable[[], Any]

    def put_layers_beside(self, layers: Sequence[int]) -> None:
        """Have the target return [N, (1 + k) H] instead of the last hidden states [N, H] of its N tokens."""
        model = self.get_model()
        model.set_aux_hidden_state_layers(tuple(layers))
        model.register_forward_hook(_beside)


def _beside(model: nn.Module, arguments: Any, output: Any) -> Any:
    # Of a pipeline's stages only the last one returns hidden states.
    return torch.cat((output[0], *output[1]), dim=-1) if isinstance(output, tuple) else output


@contextmanager
def hidden_states(
    target: str, layers: Sequence[int], options: Mapping[str, Any]
) -> Iterator[Callable[[Sequence[Sequence[int]]], list[Tensor]]]:
    """Yields a function from the token ids of rows to [L, (1 + k) H] each, in the engine's number type, on the CPU.

    layers: as `target_hidden` of training. options: of `vllm.LLM`, none of SET_HERE. The function raises what vLLM
    raises, also where the engine's process is killed.
    """
    # By default the pooler returns float32, which may be twice the bytes.
    overrides = {"head_dtype": "model", **(options.get("hf_overrides") or {})}
    with started(target, **{**options, **SET_HERE, "hf_overrides": overrides}) as llm:
        if layers:
            llm.collective_rpc("put_layers_beside", args=(list(layers),))

        def compute(rows: Sequence[Sequence[int]]) -> list[Tensor]:
            prompts = [{"prompt_token_ids": list(row)} for row in rows]
            return [each.outputs.data for each in llm.encode(prompts, pooling_task=TASK, use_tqdm=False)]

        yield compute
