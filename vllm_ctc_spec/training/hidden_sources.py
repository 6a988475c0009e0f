"""Two ways to the frozen target's hidden states: the model in this process, or a vLLM engine.

Letters: B rows of a batch, L tokens of a row, N tokens of several rows, H hidden size, W width: H for the last hidden
states and for each layer.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from vllm_ctc_spec.engine.target_layers import hands_out_layers
from vllm_ctc_spec.kv_cache import engine_options
from vllm_ctc_spec.training.objective import target_hidden
from vllm_ctc_spec.vllm_keys import check_engine_keys

OPTION = "--hidden-from-engine"
SAME_NUMBERS = (
    "block_size", "disable_log_stats", "distributed_executor_backend", "download_dir", "enable_chunked_prefill",
    "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "max_num_batched_tokens", "max_num_seqs",
    "seed", "tensor_parallel_size",
)  # fmt: skip
"""Options on which hidden states do not depend but for rounding, so that a resumed run may change them."""

Compute = Callable[[Sequence[Tensor]], Tensor]
"""Token ids [L] of each row -> [N, W], as `target_hidden`, one row after the other without padding."""
Report = Callable[[int], Any]
"""Takes the number of tokens whose hidden states have been computed since the last call."""


@dataclass(frozen=True)
class InProcess:
    target: PreTrainedModel
    batch_size: int = 8
    engine: ClassVar[None] = None

    @contextmanager
    def started(self, lengths: Sequence[int], layers: Sequence[int], report: Report) -> Iterator[Compute]:
        """lengths: tokens of the rows that will be asked for. layers: as `target_hidden`."""

        def compute(rows: Sequence[Tensor]) -> Tensor:
            """On the target's device, so that no batch waits for a copy."""
            target, lengths = self.target, [len(ids) for ids in rows]
            hidden = torch.empty(sum(lengths), hidden_width(target, layers), dtype=target.dtype, device=target.device)
            places = hidden.split(lengths)
            for start in range(0, len(rows), self.batch_size):
                batch = pad_sequence(list(rows[start : start + self.batch_size]), batch_first=True)
                batch_hidden = target_hidden(target, batch.to(target.device), layers)
                for place, row_hidden in zip(places[start:], batch_hidden):
                    place.copy_(row_hidden[: len(place)])
                report(sum(lengths[start : start + self.batch_size]))
            return hidden

        yield compute


@dataclass(frozen=True)
class FromEngine:
    """Hidden states of a vLLM engine, in processes of its own; it runs as long as they are asked for."""

    target: PreTrainedModel
    """Without its layers, see `load_without_layers`. Its number type is that of the states; the engine's, too, unless
    `options` name another."""
    target_path: str
    options: Mapping[str, Any]
    """Of `vllm.LLM`, as the user gave them, and checked by `check_engine`."""
    trust_remote_code: bool = False

    @property
    def engine(self) -> dict[str, Any]:
        return numbers_of(self.options)

    @contextmanager
    def started(self, lengths: Sequence[int], layers: Sequence[int], report: Report) -> Iterator[Compute]:
        """Arguments as of `InProcess.started`. Raises ValueError if the engine does not start, and where it fails."""
        options = self._complete(lengths)
        # Importing vLLM takes seconds and loads its plugins, which training without it should not.
        from vllm_ctc_spec.engine.hidden_states import hidden_states

        with ExitStack() as stack:
            try:
                states_of = stack.enter_context(hidden_states(self.target_path, layers, options))
            except Exception as error:
                raise ValueError(
                    f"{OPTION}: vLLM's engine did not start ({_short(error)}). What it printed says more. "
                    f"Change its options. Without {OPTION}, and with another --cache, the target runs in this process."
                ) from error

            def compute(rows: Sequence[Tensor]) -> Tensor:
                try:
                    states = states_of([ids.tolist() for ids in rows])
                except Exception as error:
                    raise ValueError(
                        f"{OPTION}: vLLM's engine failed ({_short(error)}). What it printed says more. The "
                        "shards before are written: run the same command again to go on. If it fails again, lower "
                        "max_num_seqs, or kv_cache_memory_bytes if memory was short."
                    ) from error
                hidden = torch.cat(states)
                expected = [sum(map(len, rows)), hidden_width(self.target, layers)]
                if list(hidden.shape) != expected:
                    raise ValueError(
                        f"{OPTION}: vLLM's class for this target returns hidden states of shape {list(hidden.shape)}, "
                        f"expected {expected} with target_layers={list(layers)}. Use --target-layers none."
                    )
                report(len(hidden))
                return hidden.to(self.target.dtype)

            yield compute

    def _complete(self, lengths: Sequence[int]) -> dict[str, Any]:
        given = {"dtype": str(self.target.dtype).removeprefix("torch."), **self.options}
        trust = {"trust_remote_code": True} if self.trust_remote_code else {}
        options = engine_options(self.target_path, lengths, given | trust)
        if max(lengths) > options["max_model_len"]:
            raise ValueError(
                f"{OPTION}: the longest row has {max(lengths)} tokens, and max_model_len={options['max_model_len']} "
                "of the engine has no room for it. Lower --max-length, or raise max_model_len."
            )
        return options


HiddenSource = InProcess | FromEngine


def hidden_width(target: PreTrainedModel, layers: Sequence[int]) -> int:
    """W of the last hidden states and the outputs of `layers`."""
    return int(target.config.get_text_config().hidden_size) * (1 + len(layers))


def check_engine(
    options: Mapping[str, Any], cache: Path | None, target: PretrainedConfig, layers: Sequence[int]
) -> None:
    """Raises ValueError if hidden states of `target` cannot come from an engine with these options of `vllm.LLM`.

    cache: folder that keeps them. layers: as `target_hidden`.
    """
    if cache is None:
        raise ValueError(f"{OPTION}: the engine's hidden states are kept on disk. Name a folder for them with --cache.")
    from vllm_ctc_spec.engine.hidden_states import SET_HERE

    check_engine_keys(OPTION, options)
    for key in options:
        if key in (*SET_HERE, "model", "trust_remote_code"):
            remedy = "Use --trust-remote-code" if key == "trust_remote_code" else "Leave it out"
            raise ValueError(f"{OPTION} {key}={options[key]}: the command sets it by itself. {remedy}.")
    if layers and not hands_out_layers(target.architectures or ()):
        raise ValueError(
            f"{OPTION}: vLLM's class for {', '.join(target.architectures or ['this target'])} does not hand out the "
            f"hidden states of layers {list(layers)}. Use --target-layers none."
        )


def numbers_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of options of `vllm.LLM` those on which the hidden states depend."""
    return {key: value for key, value in sorted(options.items()) if key not in SAME_NUMBERS}


def _short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
