"""Functions for `LLM.collective_rpc`: they run in the engine's worker and read or change its state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch

from vllm_ctc_spec.engine.adaptive.budget import DraftPlan
from vllm_ctc_spec.engine.draft_head import draft_head, find_lm_head
from vllm_ctc_spec.engine.host_tree import HostTree


@dataclass(frozen=True)
class RecordedTree:
    """One verified tree with the target's logits."""

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


def forget_trees(worker: Any) -> None:
    """Drop the trees after every second step; the scheduler keeps their tokens."""
    runner = worker.model_runner
    propose = runner.propose_draft_token_ids
    steps = count()

    def forgetting(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        if next(steps) % 2:
            runner.trees.clear()
        return drafts

    runner.propose_draft_token_ids = forgetting


def draft_heads(worker: Any) -> dict[str, torch.Tensor]:
    """Logits of the same rows by the target's head, the drafter's, and the drafter's for other kinds of target."""
    runner = worker.model_runner
    target, drafter = runner.model, runner.drafter.drafter
    torch.manual_seed(0)
    rows = torch.randn(5, drafter.config.hidden_size)
    products = {"target": target.compute_logits(rows), "drafter": runner.drafter.head(rows)}
    target.logits_processor.scale = 0.5
    products["of a target that scales"] = draft_head(find_lm_head(target, drafter), drafter)(rows)
    method = target.lm_head.quant_method
    target.lm_head.quant_method = SimpleNamespace(apply=method.apply)
    products["of a quantised head"] = draft_head(find_lm_head(target, drafter), drafter)(rows)
    return products


def embeddings_and_unit_logits(worker: Any) -> dict[str, torch.Tensor]:
    """The drafter's embedding of each token, and its logits for each unit vector."""
    drafter = worker.model_runner.drafter
    config = drafter.drafter.config
    return {
        "embeddings": drafter.target.embed_input_ids(torch.arange(config.vocab_size)),
        "unit logits": drafter.head(torch.eye(config.hidden_size)),
    }


def decide_by_rule(worker: Any) -> bool:
    """Plan plain steps, and steps with few and with many nodes, in turn. Returns False if there is no budget."""
    control = worker.model_runner.control
    if control is None:
        return False
    steps = count()

    def plan(num_requests: int) -> DraftPlan | None:
        step = next(steps)
        # At rate 0 a node is free; at one token per second it costs 0.3 tokens.
        return DraftPlan(num_requests, float(step % 5 > 3), 0.3) if step % 3 else None

    control.budget.plan = plan
    return True


def draft_otherwise(worker: Any) -> None:
    """Change the drafter on all ranks but the first."""
    if worker.rank:
        worker.model_runner.drafter.drafter.frame_queries.mul_(-1)


def record_proposals(worker: Any) -> None:
    drafter = worker.model_runner.drafter
    propose = drafter.propose
    worker.model_runner.proposed_tokens = []

    def recording(*args: Any) -> list[HostTree]:
        trees = propose(*args)
        worker.model_runner.proposed_tokens.append([tree.tokens for tree in trees])
        return trees

    drafter.propose = recording


def proposed_tokens(worker: Any) -> list[list[list[int]]]:
    """Tokens of the trees that this rank drafted, by step and request."""
    return worker.model_runner.proposed_tokens
