"""The whole method on a Hugging Face model, greedy, without cache or batching: slow, and easy to read.

Every step runs the target once over [verified text, anchor, tree nodes], with a mask that lets each node see the text
and its ancestors, then walks the tree along the target's greedy choices. Tests compare the engine with it.

Letters: P positions of the text with the anchor, N nodes, H hidden size, V vocabulary without blank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_ctc_spec.algorithm import TokenTrees, accept_greedy
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of, set_tables_from
from vllm_ctc_spec.drafter.modeling import CTCDrafter, KeyValue


@dataclass(frozen=True)
class ReferenceStep:
    tree: TokenTrees
    """One request's tree; R = 1."""
    accepted_nodes: list[int]
    """Node indices from the anchor's child downwards."""
    tokens: list[int]
    """Tokens of the step: the accepted path, then the target's own token."""


@torch.inference_mode()
def decode(
    target: Any, drafter: CTCDrafter, prompt: list[int], num_nodes: int, options: SpecOptions
) -> Iterator[ReferenceStep]:
    """Yield decoding steps without end. The first one reads the prompt and has no tree.

    target: a transformers causal LM.
    """
    set_tables_from(drafter, target)
    size, layers = drafter.config.hidden_size, drafter.config.target_layers
    hidden = run_target(target, layers, torch.tensor([prompt]))
    text = [*prompt, int(target.lm_head(hidden[:, -1, :size]).argmax())]
    yield ReferenceStep(_empty_tree(), [], text[-1:])
    while True:
        tree = draft(target, drafter, hidden, text[-2:], num_nodes, options)
        count = int(tree.num_nodes)
        hidden_with_tree = run_target(target, layers, *tree_inputs(text, tree))
        rows = hidden_with_tree[:, len(text) - 1 :, :size]
        choices = F.pad(target.lm_head(rows).argmax(-1), (0, tree.tokens.shape[1] - count))
        path = accept_greedy(tree, choices)
        nodes = path.nodes[0, : int(path.num_accepted)].tolist()
        emitted = [*(int(tree.tokens[0, node - 1]) for node in nodes), int(choices[0, nodes[-1] if nodes else 0])]
        verified = torch.tensor([*range(len(text)), *(len(text) - 1 + node for node in nodes)])
        hidden = hidden_with_tree[:, verified]
        text.extend(emitted)
        yield ReferenceStep(tree, nodes, emitted)


def run_target(
    target: Any, layers: Sequence[int], tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """[1, P, (1 + k) H], last hidden states after the final norm, then outputs of the k `layers`; tokens: [1, P]."""
    options = {"attention_mask": mask, "position_ids": positions, "output_hidden_states": True, "use_cache": False}
    outputs = target.model(tokens, **options)
    return torch.cat((outputs.last_hidden_state, *(outputs.hidden_states[layer] for layer in layers)), dim=-1)


def tree_inputs(text: list[int], tree: TokenTrees) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [1, P + N], additive mask [1, 1, P + N, P + N] and positions [1, P + N] of the text and a tree."""
    count, length = int(tree.num_nodes), len(text)
    tokens = torch.tensor([[*text, *tree.tokens[0, :count].tolist()]])
    depths = tree.depths[0, :count]
    positions = torch.cat((torch.arange(length), length - 1 + depths))[None]
    allowed = torch.ones(length + count, length + count, dtype=torch.bool).tril()
    bits = torch.arange(count + 1)
    allowed[length - 1 :, length - 1 :] = ((tree.ancestor_masks()[0, : count + 1, None] >> bits) & 1).bool()
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
    return tokens, mask[None, None], positions


def draft(
    target: Any, drafter: CTCDrafter, hidden: Tensor, last_tokens: list[int], num_nodes: int, options: SpecOptions
) -> TokenTrees:
    """The tree for the next step.

    hidden: [1, n + 1, (1 + k) H] of positions 0..n; last_tokens: the tokens at n and n + 1, which is the anchor.
    """
    hidden, length = drafter.fuse(hidden), hidden.shape[1]
    context = drafter.context(hidden, torch.arange(length)[None])
    last = torch.tensor([last_tokens])

    def attend(layer: int, query: Tensor, own: KeyValue) -> Tensor:
        keys = torch.cat((context[layer].key, own.key), dim=1).transpose(1, 2)
        values = torch.cat((context[layer].value, own.value), dim=1).transpose(1, 2)
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, enable_gqa=True).transpose(1, 2)

    drafted = drafter(target.get_input_embeddings()(last), hidden[:, -1], torch.tensor([length]), attend)
    logits = emission_logits(drafter, drafted.frames, head_of(drafter, target.lm_head.weight))
    return draft_trees(drafter, drafted, logits, num_nodes, options)


def _empty_tree() -> TokenTrees:
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    return TokenTrees(nothing, nothing, nothing, torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64))
