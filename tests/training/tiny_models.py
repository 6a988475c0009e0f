"""A random target and drafter of a few thousand weights."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.drafter.drafting import set_tables_from
from vllm_ctc_spec.training.models import drafter_config

VOCAB = 64


def tiny_target(tied: bool = True, **overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | overrides)).eval()


def teach(target: LlamaForCausalLM, text: torch.Tensor, steps: int = 60) -> None:
    """Let the target write this text. text: [B, L] int64."""
    optimizer = torch.optim.AdamW(target.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        target(text, labels=text).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def tiny_drafter(target: LlamaForCausalLM, **overrides: object) -> CTCDrafter:
    torch.manual_seed(1)
    fields = {"num_frames": 4, "label_length": 3, "condition_rank": 8, "initializer_range": 0.2}
    drafter = CTCDrafter(drafter_config(target.config, **fields | overrides)).eval()
    set_tables_from(drafter, target)
    return drafter
