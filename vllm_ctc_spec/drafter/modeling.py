"""The CTC drafter: one module for training, for the reference loop and for vLLM.

Letters: T frames, H hidden size, V vocabulary without blank, K tokens of it that are drafted, r rank of the
conditioning (0 if there is none).

From every verified position i the target's last hidden state h_i gives keys and values; they depend on
nothing later, so a prefix cache may share them. At a step the drafter runs 1 + T queries per request, at
positions n + 1 ... n + 1 + T: the anchor, then T frames, all conditioned on h_n. Queries see the context
[0, n] and each other. How keys are stored and attended is the caller's business: it passes `attend`.
What comes out at the anchor opens and closes the directions of the conditioning (the gate).
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
    """[..., num_key_value_heads, head_dim], rotated to its position."""
    value: Tensor
    """[..., num_key_value_heads, head_dim]"""


class Draft(NamedTuple):
    """What the drafter says about the tokens after an anchor."""

    frames: Tensor
    """[..., T, H], to be fed to rows of the target's LM head and, where there is a blank, to `blank_logits`."""
    start: Tensor
    """[..., r], the conditioning's state of the empty prefix, which the two last tokens make."""
    gate: Tensor
    """[..., r]"""

    def of(self, chosen: Tensor) -> Draft:
        """Of some anchors only; chosen: a mask of, or indices into, the leading dimensions."""
        return Draft(*(each[chosen] for each in self))


Attend = Callable[[int, Tensor, KeyValue], Tensor]
"""attend(layer, query [..., num_attention_heads, head_dim], own keys and values) -> like query."""


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
    """The draft module. It holds no embedding and no LM head: both are the target's and are passed in."""

    config_class = CTCDrafterConfig
    base_model_prefix = ""

    draft_vocab: Tensor | None
    """[K] int64, distinct, the most frequent first: the tokens that are drafted; None for all V."""

    def __init__(self, config: CTCDrafterConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.anchor_norm = RMSNorm(size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(size, config.rms_norm_eps)
        self.fuse_proj = nn.Linear(2 * size, size, bias=False)
        self.frame_queries = nn.Parameter(torch.empty(config.num_frames + 1, size))
        self.layers = nn.ModuleList(DrafterLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        # Drafting from the frequent tokens alone makes the LM head cheap (Zhao et al. 2025, arXiv 2502.14856).
        size_drafted = config.draft_vocab_size
        self.register_buffer("draft_vocab", None if size_drafted is None else torch.arange(size_drafted))
        if config.has_blank:
            self.blank = nn.Parameter(torch.empty(size))
            self.blank_bias = nn.Parameter(torch.zeros(1))
        if config.emission == "conditioned":
            self.condition_last = nn.Embedding(config.vocab_size, config.condition_rank)
            self.condition_next = nn.Embedding(config.vocab_size + config.has_blank, config.condition_rank)
            self.condition_carry = nn.Linear(config.condition_rank, config.condition_rank, bias=False)
            self.condition_gate = nn.Linear(size, config.condition_rank, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Embedding):
            # The first product of the two tables must be small but its gradient must not vanish.
            is_next = module is getattr(self, "condition_next", None)
            nn.init.normal_(module.weight, std=std if is_next else max(self.config.condition_rank, 1) ** -0.5)
        elif isinstance(module, CTCDrafter):
            nn.init.normal_(module.frame_queries, std=std)
            if self.config.has_blank:
                nn.init.normal_(module.blank, std=std)

    def context(self, hidden: Tensor, positions: Tensor) -> list[KeyValue]:
        """Keys and values, one per layer, of verified positions.

        hidden: [..., H], the target's last hidden states (after its final norm); positions: [...] int64.
        """
        return [cast(DrafterLayer, layer).context(hidden, positions) for layer in self.layers]

    def draft_only(self, tokens: Tensor) -> None:
        """tokens: [K] int64, distinct, the most frequent first."""
        self.config.draft_vocab_size, self.draft_vocab = len(tokens), tokens

    @property
    def conditioning(self) -> Conditioning:
        """Of a drafter whose emissions are conditioned."""
        return Conditioning(self.condition_last.weight, self.condition_carry.weight, self.condition_next.weight)

    def forward(
        self, last_tokens: Tensor, anchor_embedding: Tensor, hidden: Tensor, positions: Tensor, attend: Attend
    ) -> Draft:
        """last_tokens: [..., 2] int64, the token at position n and the anchor; anchor_embedding: [..., H], the target's
        embedding of the anchor; hidden: [..., H], h_n; positions: [...] int64, the anchor's position n + 1.
        """
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
        before, last = last_tokens.unbind(-1)
        start = self.condition_last(last) + self.condition_carry(self.condition_last(before))
        return Draft(frames, start, 1 + self.condition_gate(anchor))

    def blank_logits(self, frames: Tensor) -> Tensor:
        """[..., T] from frames [..., T, H], if there is a blank; it is column V of the emission logits."""
        return frames @ self.blank + self.blank_bias
