"""The CTC drafter: one module for training, for the reference loop and for vLLM.

Letters: T frames, H hidden size, V vocabulary without blank, K tokens of it that are drafted, r rank of the
conditioning (0 if there is none).

The tables A and B [V, r] of the conditioning are not weights. A small network computes row c of A from the target's
embedding of token c, another one row c of B from the LM head's row of c. A drafter is therefore small for any
vocabulary, and tokens that training never saw have rows too. `set_tables` computes the tables, once for serving.

Each verified position i has one key and one value per head, computed from the target's hidden state h_i. They depend
on nothing later, so a prefix cache may share them. h_i is the target's last hidden state plus a learnt projection of
the outputs of a few earlier layers (`fuse`; several layers are EAGLE-3's idea, Li et al. 2025, arXiv 2503.01840). A
step runs 1 + T queries per request, at positions n + 1 ... n + 1 + T: the anchor and T frames, all conditioned on h_n.
Queries attend to the context [0, n] and to each other. The caller stores keys and values and passes `attend`. The
output at the anchor is the gate, which scales the directions of the conditioning's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_ctc_spec.algorithm import Conditioning
from vllm_ctc_spec.config import CTCDrafterConfig


class KeyValue(NamedTuple):
    key: Tensor
    """[..., num_key_value_heads, head_dim], with rotary embedding applied."""
    value: Tensor
    """[..., num_key_value_heads, head_dim]"""


class Draft(NamedTuple):
    """The drafter's output for the tokens after an anchor."""

    frames: Tensor
    """[..., T, H], input of the target's LM head and, with a blank, of `blank_logits`."""
    start: Tensor
    """[..., r], the conditioning's state of the empty prefix, computed from the last two tokens."""
    gate: Tensor
    """[..., r], factors of the conditioning's states."""

    def of(self, chosen: Tensor) -> Draft:
        """The drafts of some anchors; chosen: a mask of, or indices into, the leading dimensions."""
        return Draft(*(each[chosen] for each in self))


Attend = Callable[[int, Tensor, KeyValue], Tensor]
"""attend(layer, query [..., num_attention_heads, head_dim], keys and values of the queries) -> shape of query."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding, [..., head_dim / 2] each, computed in float32; positions: [...] int64."""
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    turned = positions.to(torch.float32)[..., None] * frequencies
    return turned.cos().to(dtype), turned.sin().to(dtype)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (Su et al., arXiv 2104.09864), half-split as in Llama.

    x: [..., heads, head_dim]; positions: [...] int64.
    """
    cos, sin = (each[..., None, :] for each in angles(positions, x.shape[-1], theta, x.dtype))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Rotary(nn.Module):
    """`rotate` with a theta of its own."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.theta)


class TokenMap(nn.Module):
    """[..., H] -> [..., r], a token's row of a conditioning table from its row of the target's embedding or LM head.

    spread: standard deviation of the result before training.
    """

    def __init__(self, size: int, rank: int, eps: float, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.norm = RMSNorm(size, eps)
        self.up_proj = nn.Linear(size, 2 * rank, bias=False)
        self.down_proj = nn.Linear(2 * rank, rank, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.up_proj(self.norm(rows)))))

    def reset(self) -> None:
        nn.init.normal_(self.up_proj.weight, std=self.up_proj.in_features**-0.5)
        # SiLU of a standard normal variable has a root mean square of 0.6.
        nn.init.normal_(self.down_proj.weight, std=self.spread / 0.6 * max(self.down_proj.in_features, 1) ** -0.5)


class DrafterLayer(nn.Module):
    def __init__(self, config: CTCDrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        size, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.rotary = Rotary(config.head_dim, config.rope_theta)
        self.context_norm = RMSNorm(size, config.rms_norm_eps)
        self.input_norm = RMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(size, kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(size, kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, size, bias=False)
        self.mlp_norm = RMSNorm(size, config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _key_value(self, normed: Tensor, positions: Tensor) -> KeyValue:
        key = self.rotary(self._split_heads(self.k_proj(normed)), positions)
        return KeyValue(key, self._split_heads(self.v_proj(normed)))

    def context(self, hidden: Tensor, positions: Tensor) -> KeyValue:
        return self._key_value(self.context_norm(hidden), positions)

    def forward(self, x: Tensor, positions: Tensor, attend: Callable[[Tensor, KeyValue], Tensor]) -> Tensor:
        normed = self.input_norm(x)
        query = self.rotary(self._split_heads(self.q_proj(normed)), positions)
        x = x + self.o_proj(attend(query, self._key_value(normed, positions)).flatten(-2))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class CTCDrafter(PreTrainedModel):
    """The draft module. It has no embedding and no LM head of its own; the target's are passed in."""

    config_class = CTCDrafterConfig
    base_model_prefix = ""

    draft_vocab: Tensor | None
    """[K] int64, ids of the drafted tokens, distinct, the most frequent first; None: all V tokens."""
    state_in_table: Tensor | None
    logit_out_table: Tensor | None
    """Tables A and B of `conditioning`; None until `set_tables`."""

    def __init__(self, config: CTCDrafterConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.layer_norms = nn.ModuleList(RMSNorm(size, config.rms_norm_eps) for _ in config.target_layers)
        if config.target_layers:
            self.layers_proj = nn.Linear(len(config.target_layers) * size, size, bias=False)
        self.anchor_norm = RMSNorm(size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(size, config.rms_norm_eps)
        self.fuse_proj = nn.Linear(2 * size, size, bias=False)
        self.frame_queries = nn.Parameter(torch.empty(config.num_frames + 1, size))
        self.layers = nn.ModuleList(DrafterLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        # Drafting only frequent tokens makes the LM head cheap (Zhao et al. 2025, arXiv 2502.14856).
        size_drafted = config.draft_vocab_size
        self.register_buffer("draft_vocab", None if size_drafted is None else torch.arange(size_drafted))
        if config.has_blank:
            self.blank = nn.Parameter(torch.empty(size))
            self.blank_bias = nn.Parameter(torch.zeros(1))
        if config.emission == "conditioned":
            rank, eps = config.condition_rank, config.rms_norm_eps
            # Before training the product of A and B must be small, but its gradient must not vanish.
            self.condition_last = TokenMap(size, rank, eps, spread=max(rank, 1) ** -0.5)
            self.condition_next = TokenMap(size, rank, eps, spread=config.initializer_range)
            if config.has_blank:
                self.condition_blank = nn.Parameter(torch.empty(1, rank))
            self.condition_carry = nn.Linear(rank, rank, bias=False)
            self.condition_gate = nn.Linear(size, rank, bias=False)
        self.register_buffer("state_in_table", None, persistent=False)
        self.register_buffer("logit_out_table", None, persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, CTCDrafter):
            nn.init.normal_(module.frame_queries, std=std)
            if self.config.has_blank:
                nn.init.normal_(module.blank, std=std)
                if self.config.emission == "conditioned":
                    nn.init.normal_(module.condition_blank, std=std)
        elif isinstance(module, TokenMap):
            # transformers initialises a module after its children, so these weights are not overwritten.
            module.reset()

    def fuse(self, hidden: Tensor) -> Tensor:
        """[..., H] from hidden [..., (1 + k) H]: the target's last hidden states (after its final norm), then the
        outputs of the k `target_layers`.
        """
        last, *earlier = hidden.split(self.config.hidden_size, dim=-1)
        if not earlier:
            return last
        normed = [norm(states) for norm, states in zip(self.layer_norms, earlier, strict=True)]
        return last + cast(Tensor, self.layers_proj(torch.cat(normed, dim=-1)))

    def context(self, hidden: Tensor, positions: Tensor) -> list[KeyValue]:
        """Keys and values of verified positions, one entry per layer.

        hidden: [..., H], from `fuse`; positions: [...] int64.
        """
        return [cast(DrafterLayer, layer).context(hidden, positions) for layer in self.layers]

    def draft_only(self, tokens: Tensor) -> None:
        """Set the draft vocabulary. tokens: [K] int64, distinct, the most frequent first."""
        self.config.draft_vocab_size, self.draft_vocab = len(tokens), tokens

    def next_rows(self, lm_head: Tensor) -> Tensor:
        """[n, r], rows of B for rows lm_head [n, H] of the target's LM head; with a blank [n + 1, r], blank last."""
        rows = self.condition_next(lm_head)
        return torch.cat((rows, self.condition_blank.to(rows.dtype))) if self.config.has_blank else rows

    @torch.no_grad()
    def set_tables(self, embedding: Tensor, lm_head: Tensor) -> None:
        """Compute A and B. Call it again when the weights change. embedding, lm_head: [V, H], the target's."""
        if self.config.emission == "conditioned":
            dtype = self.norm.weight.dtype
            self.state_in_table = self.condition_last(embedding.to(dtype))
            self.logit_out_table = self.next_rows(lm_head.to(dtype))

    @property
    def conditioning(self) -> Conditioning:
        """For conditioned emissions, once `set_tables` was called."""
        assert self.state_in_table is not None and self.logit_out_table is not None
        return Conditioning(self.state_in_table, self.condition_carry.weight, self.logit_out_table)

    def forward(self, last_embeddings: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> Draft:
        """Draft the tokens after an anchor.

        last_embeddings: [..., 2, H], the target's embeddings of the token at position n and of the anchor;
        hidden: [..., H], h_n, from `fuse`; positions: [...] int64, the anchor's position n + 1.
        """
        anchor_embedding = last_embeddings[..., 1, :]
        fused = self.fuse_proj(torch.cat((self.anchor_norm(anchor_embedding), self.hidden_norm(hidden)), dim=-1))
        x = fused[..., None, :] + self.frame_queries
        offsets = torch.arange(x.shape[-2], device=positions.device)
        query_positions = positions[..., None] + offsets
        for index, layer in enumerate(self.layers):
            x = layer(x, query_positions, lambda query, own, index=index: attend(index, query, own))
        outputs = self.norm(x)
        anchor, frames = outputs[..., 0, :], outputs[..., 1:, :]
        if self.config.emission == "independent":
            return Draft(frames, anchor[..., :0], anchor[..., :0])
        before, last = self.condition_last(last_embeddings).unbind(-2)
        return Draft(frames, last + self.condition_carry(before), 1 + self.condition_gate(anchor))

    def blank_logits(self, frames: Tensor) -> Tensor:
        """[..., T], the blank's column of the emission logits, from frames [..., T, H]. Only with a blank."""
        return frames @ self.blank + self.blank_bias
