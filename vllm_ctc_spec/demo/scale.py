"""Sizes and budgets of the demo: everything that differs between the demo proper and the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_ctc_spec.training.budget import Budget


@dataclass(frozen=True)
class DemoScale:
    name: str
    max_corpus_chars: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_kv_heads: int
    target_context: int
    target_batch: int
    target_rate: float
    target_budget: Budget
    num_prompts: int
    """Prompts that the target continues to make the drafter's training rows."""
    num_heldout_prompts: int
    num_new_tokens: int
    drafter_budget: Budget
    drafter_rate: float = 8e-3
    drafter: dict[str, Any] = field(default_factory=lambda: {"num_frames": 8, "label_length": 8, "condition_rank": 128})
    """Smaller than the default, as befits so small a target."""
    temperatures: tuple[float, ...] = (0.0, 0.4)
    max_position_embeddings: int = 1024

    @classmethod
    def full(cls) -> DemoScale:
        return cls(
            name="full",
            max_corpus_chars=12_000_000,
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=768,
            num_layers=12,
            num_kv_heads=2,
            target_context=256,
            target_batch=8,
            target_rate=1.2e-2,
            target_budget=Budget(max_steps=550, max_seconds=180),
            num_prompts=1152,
            num_heldout_prompts=128,
            num_new_tokens=128,
            drafter_budget=Budget(max_steps=2000, max_seconds=80),
        )

    @classmethod
    def tiny(cls) -> DemoScale:
        return cls(
            name="tiny",
            max_corpus_chars=400_000,
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_layers=2,
            num_kv_heads=1,
            target_context=128,
            target_batch=8,
            target_rate=1.2e-2,
            target_budget=Budget(max_steps=200),
            num_prompts=256,
            num_heldout_prompts=32,
            num_new_tokens=64,
            drafter_budget=Budget(max_steps=200),
        )
