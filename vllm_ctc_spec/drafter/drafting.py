"""From the drafter's frames to token trees: the one way, for serving, for the reference loop and for evaluation.

Letters: R requests, T frames, H hidden size, V vocabulary without blank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_ctc_spec.algorithm import (
    ConditionedEmissions,
    IndependentEmissions,
    TokenTrees,
    build_chains,
    build_prefix_trees,
    build_template_trees,
    conditioned_emissions,
    independent_emissions,
    search_chains,
    search_prefix_trees,
)
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.modeling import CTCDrafter, Draft


def emission_logits(drafter: CTCDrafter, frames: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
    """[R, T, V], or with a blank [R, T, V + 1], float32; frames: [R, T, H]; lm_head: the target's, [n, H] -> [n, V]."""
    logits = lm_head(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    if drafter.config.has_blank:
        logits = torch.cat((logits, drafter.blank_logits(frames)[..., None]), dim=-1)
    return logits.float()


def emissions(
    drafter: CTCDrafter, draft: Draft, logits: Tensor, candidates: int
) -> ConditionedEmissions | IndependentEmissions:
    """Emission probabilities over `candidates` tokens for each frame; logits: of the draft's frames."""
    num_candidates = candidates * logits.shape[1]
    if drafter.config.emission == "independent":
        return independent_emissions(logits, num_candidates)
    return conditioned_emissions(logits, draft.start, draft.gate, drafter.conditioning, num_candidates)


def draft_trees(drafter: CTCDrafter, draft: Draft, logits: Tensor, num_nodes: int, options: SpecOptions) -> TokenTrees:
    if options.tree == "template":
        if not drafter.config.has_blank:
            logits = F.pad(logits, (0, 1), value=-torch.inf)
        return build_template_trees(logits, num_nodes)
    table = emissions(drafter, draft, logits, options.candidates)
    if can_search(table):
        if options.tree == "chain":
            return search_chains(table, num_nodes)
        return search_prefix_trees(table, num_nodes, options.min_prefix_probability)
    if options.tree == "chain":
        return build_chains(table, num_nodes)
    return build_prefix_trees(table, num_nodes, options.min_prefix_probability)


def can_search(table: ConditionedEmissions | IndependentEmissions) -> TypeGuard[ConditionedEmissions]:
    """Whether the host may search for the trees, which is faster than to build them level by level."""
    return isinstance(table, ConditionedEmissions) and table.blank_logp is None and table.tokens.device.type == "cpu"
