"""Model shapes of the Llama family for the step-cost benchmarks, which give them random weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    head_size: int


SHAPES = {
    "tiny": Shape(4, 256, 512, 4, 1, 32000, 64),
    "0.5B": Shape(24, 1280, 3840, 20, 5, 32000, 64),
    "1B": Shape(16, 2048, 8192, 32, 8, 32000, 64),
    "7B": Shape(32, 4096, 11008, 32, 32, 32000, 128),
    "8B": Shape(32, 4096, 14336, 32, 8, 128256, 128),
}
"""Llama-2-7B, Llama-3-8B, two smaller ones for a CPU, and a tiny one to try a command."""
