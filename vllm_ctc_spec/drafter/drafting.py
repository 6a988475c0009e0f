"""Builds token trees from the drafter's frames, for serving, the reference loop and evaluation alike.

Letters: R requests, T frames, H hidden size, V vocabulary without blank, K tokens of it that are drafted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

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


def head_of(drafter: CTCDrafter, lm_head: Tensor) -> Callable[[Tensor], Tensor]:
    """The argument `head` of `emission_logits`, from the target's LM head [V, H]. Make it once: it may copy rows."""
    return partial(F.linear, weight=lm_head if drafter.draft_vocab is None else lm_head[drafter.draft_vocab])


def set_tables_from(drafter: CTCDrafter, target: Any) -> None:
    """Compute the tables. Call it again when the drafter's weights change. target: a transformers causal LM."""
    tokens = torch.arange(drafter.config.vocab_size, device=drafter.device)
    drafter.set_tables(target.get_input_embeddings()(tokens), target.get_output_embeddings().weight)


def emission_logits(drafter: CTCDrafter, frames: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """[R, T, K], or with a blank [R, T, K + 1], float32; frames: [R, T, H].

    head: [n, H] -> [n, K], the product with the drafted tokens' rows of the target's LM head, from `head_of`.
    """
    logits = head(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    if drafter.config.has_blank:
        logits = torch.cat((logits, drafter.blank_logits(frames)[..., None]), dim=-1)
    return logits.float()


def emissions(
    drafter: CTCDrafter, draft: Draft, logits: Tensor, candidates: int
) -> ConditionedEmissions | IndependentEmissions:
    """Emission probabilities of `candidates` * T candidate tokens. logits: from `emission_logits`."""
    num_candidates = candidates * logits.shape[1]
    if drafter.config.emission == "independent":
        return independent_emissions(logits, num_candidates, drafter.draft_vocab)
    return conditioned_emissions(
        logits, draft.start, draft.gate, drafter.conditioning, num_candidates, drafter.draft_vocab
    )


def over_all_tokens(drafter: CTCDrafter, logits: Tensor) -> Tensor:
    """`emission_logits` with a column for each of the V tokens; -inf for tokens that are never drafted."""
    if drafter.draft_vocab is None:
        return logits
    drafted, vocab_size = drafter.draft_vocab, drafter.config.vocab_size
    labels = F.pad(drafted, (0, logits.shape[-1] - len(drafted)), value=vocab_size)
    wide = logits.new_full((*logits.shape[:-1], vocab_size + len(labels) - len(drafted)), -torch.inf)
    wide[..., labels] = logits
    return wide


def draft_trees(drafter: CTCDrafter, draft: Draft, logits: Tensor, num_nodes: int, options: SpecOptions) -> TokenTrees:
    """Trees of at most `num_nodes` nodes. logits: from `emission_logits`, of the frames of `draft`."""
    if options.tree == "template":
        logits = over_all_tokens(drafter, logits)
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
    """Whether best-first search applies (algorithm/best_first.py), which on a CPU is faster than building by level."""
    return isinstance(table, ConditionedEmissions) and table.blank_logp is None and table.tokens.device.type == "cpu"
