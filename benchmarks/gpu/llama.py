"""A Llama with random weights over vLLM's paged cache layout. Its steps cost what a real one's do; its text is noise.

Letters: M rows of the step, H hidden size, V vocabulary, K key-value heads, D head size, B block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Shape
from vllm_ctc_spec.drafter.modeling import rotate
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.attention import tree_attention

EPSILON, THETA = 1e-5, 10000.0


@torch.compile(dynamic=True)
def _qkv(x: Tensor, norm: Tensor, weight: Tensor, positions: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    """Query [M, heads, D], key and value [M, K, D] of x [M, H]; query and key with rotary embedding."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    rows = (F.rms_norm(x, x.shape[-1:], norm, EPSILON) @ weight.T).unflatten(-1, (-1, shape.head_size))
    rotated, value = rows.split((heads + kv_heads, kv_heads), dim=1)
    return *rotate(rotated, positions, THETA).split((heads, kv_heads), dim=1), value.contiguous()


def store(kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Writes keys and values [M, K, D] to slots [M] int64 of a cache [blocks, K, B, 2 * D]."""
    block_size = kv_cache.shape[2]
    kv_cache[slots // block_size, :, slots % block_size] = torch.cat((key, value), dim=-1)


@torch.compile(dynamic=True)
def _after_attention(x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    x = x + attended.flatten(1) @ out.T
    gate, up = (F.rms_norm(x, x.shape[-1:], norm, EPSILON) @ gate_up.T).chunk(2, dim=-1)
    return x + (F.silu(gate) * up) @ down.T


@dataclass(frozen=True)
class Layer:
    norms: Tensor
    """[2, H]"""
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    kv_cache: Tensor
    """[blocks, K, B, 2 * D]"""


class Llama:
    def __init__(self, shape: Shape, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.shape = shape
        size, inner, head_size = shape.hidden_size, shape.intermediate_size, shape.head_size
        rows = (shape.num_heads + 2 * shape.num_kv_heads) * head_size

        def weight(*sizes: int) -> Tensor:
            return torch.randn(sizes, dtype=torch.bfloat16, device=device) * sizes[-1] ** -0.5

        self.embedding = weight(shape.vocab_size, size)
        self.lm_head = weight(shape.vocab_size, size)
        self.norm = torch.ones(size, dtype=torch.bfloat16, device=device)
        self.layers = [
            Layer(
                norms=self.norm.repeat(2, 1),
                qkv=weight(rows, size),
                out=weight(size, shape.num_heads * head_size),
                gate_up=weight(2 * inner, size),
                down=weight(size, inner),
                kv_cache=weight(num_blocks, shape.num_kv_heads, block_size, 2 * head_size),
            )
            for _ in range(shape.num_layers)
        ]

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor, batch: TreeBatch) -> tuple[Tensor, Tensor]:
        """Last hidden states [M, H] and logits [M, V] of tokens, positions [M] int64.

        Writes the rows' keys and values to slots [M] int64 of every layer's cache.
        """
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            query, key, value = _qkv(x, layer.norms[0], layer.qkv, positions, self.shape)
            store(layer.kv_cache, slots, key, value)
            attended = torch.empty_like(query)
            tree_attention(query, key, value, layer.kv_cache, batch, self.shape.head_size**-0.5, attended)
            x = _after_attention(x, attended, layer.out, layer.norms[1], layer.gate_up, layer.down)
        hidden = F.rms_norm(x, x.shape[-1:], self.norm, EPSILON)
        return hidden, hidden @ self.lm_head.T
