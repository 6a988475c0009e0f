"""Functions that run inside an engine's worker (`LLM.collective_rpc`) and look at the real thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_ctc_spec.engine.sampler import HostTree


@dataclass(frozen=True)
class RecordedTree:
    """One verified tree: what the target read and what it answered."""

    text: list[int]
    """Verified tokens, the anchor last."""
    tree: HostTree
    logits: torch.Tensor
    """[N + 1, V], row 0 for the anchor."""


def record_trees(worker: Any) -> None:
    runner = worker.model_runner
    walk = runner.walker
    runner.recorded_trees = []

    def recording(logits: torch.Tensor, trees: list[HostTree], *rest: Any) -> Any:
        row = 0
        for request, tree in zip(runner.input_batch.req_ids, trees):
            state = runner.requests[request]
            text = [*state.prompt_token_ids, *state.output_token_ids]
            end = row + len(tree.tokens) + 1
            if tree.tokens:
                runner.recorded_trees.append(RecordedTree(text, tree, logits[row:end].clone()))
            row = end
        return walk(logits, trees, *rest)

    runner.walker = recording


def recorded_trees(worker: Any) -> list[RecordedTree]:
    return worker.model_runner.recorded_trees
