"""Tiny random targets of each family, and a program that serves them one after the other.

`python -m tests.engine.families plain|trees FOLDER` serves the targets below FOLDER and writes the answers there. It
imports vLLM once for all of them, because the import takes most of an engine's start.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pickle
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from tests.engine.probe import RecordedTree, record_trees, recorded_trees
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.training.models import drafter_config

VOCAB, HIDDEN, LAYERS, HEADS, INNER, CONTEXT = 64, 64, 2, 2, 96, 128
NUM_NODES = 63
TREES = {"num_speculative_tokens": NUM_NODES, "candidates": 64, "adaptive_budget": False}

TOKENS = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
# Large weights, so that some tokens are much likelier than others.
SIZES = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.2, **TOKENS,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": INNER, "num_key_value_heads": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# The smaller window is shorter than the trees are deep.
SMALL_WINDOW, WINDOW = {"sliding_window": 2}, {"sliding_window": 9}
FULL, WINDOWED = "full_attention", "sliding_attention"
SOFT_CAPS = {"head_dim": 32, "attn_logit_softcapping": 2.0}

EXACT: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED),
    "qwen3": Qwen3Config(**GATED, head_dim=32),
    "qwen3-moe": Qwen3MoeConfig(**GATED, **EXPERTS, head_dim=32, num_experts=4),
    "mixtral": MixtralConfig(**GATED, num_experts_per_tok=2, num_local_experts=4),
    "phi-2": PhiConfig(**SIZES, intermediate_size=INNER),
    "phi-3": Phi3Config(**GATED),
    "olmo2": Olmo2Config(**GATED),
    "granite": GraniteConfig(**GATED, logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "cohere": CohereConfig(**GATED, logit_scale=0.5),
    "gemma": GemmaConfig(**GATED, head_dim=32),
    "gemma-2": Gemma2Config(**GATED, **SMALL_WINDOW, **SOFT_CAPS),
    "gemma-2-one-group": Gemma2Config(**GATED, **SMALL_WINDOW, **SOFT_CAPS),
    # Two KV groups: the layers with a window; the layer without one and the drafter's.
    "gemma-3": Gemma3TextConfig(
        **GATED | {"num_hidden_layers": 3}, **WINDOW, head_dim=32, layer_types=[WINDOWED, FULL, WINDOWED]
    ),
    "granite-swa": GraniteSWAConfig(**GATED, **WINDOW),
    "gpt-oss": GptOssConfig(**GATED, **SMALL_WINDOW, head_dim=32, num_local_experts=4, num_experts_per_tok=2),
    "mistral-window": MistralConfig(**GATED, **WINDOW),
    "qwen2-window": Qwen2Config(**GATED, **WINDOW, use_sliding_window=True, max_window_layers=0),
    "cohere-2": Cohere2Config(**GATED, **WINDOW, layer_types=[WINDOWED, FULL], logit_scale=0.5),
    "olmo-3": Olmo3Config(**GATED, **WINDOW, layer_types=[WINDOWED, FULL]),
    "starcoder2": Starcoder2Config(**GATED),
    "stablelm": StableLmConfig(**GATED),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=INNER),
    "gpt-2": GPT2Config(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, initializer_range=0.2, **TOKENS
    ),
    "opt": OPTConfig(**SIZES | {"pad_token_id": 1}, ffn_dim=INNER, word_embed_proj_dim=HIDDEN, init_std=0.2),
    "falcon": FalconConfig(**SIZES, multi_query=True, alibi=False),
    # vLLM has a model class for it, transformers has none; its weights have Llama's names.
    "minicpm": LlamaConfig(**GATED, scale_emb=3, scale_depth=1.4, dim_model_base=32),
}
ARCHITECTURES = {"minicpm": "MiniCPMForCausalLM"}
OTHERWISE_IN_TRAINING = {*ARCHITECTURES, "mistral-window", "qwen2-window", "cohere-2"}
"""Trees differ from training's: the drafter has a window in the engine only; Cohere's is one longer in vLLM."""
OF_ONE_GROUP = {"disable_hybrid_kv_cache_manager": True}
OPTIONS = {name: OF_ONE_GROUP for name in EXACT if name.endswith("one-group")}
"""Engine options of single families."""

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4, 6]]
PROMPTS += [[index * index % 61 for index in range(75)]]
"""The last prompt is so long that a window frees its first blocks."""
LENGTH = 24
# One for each prompt, in one batch.
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 1, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0.7, "top_k": 20, "min_p": 0.02, "seed": 2},
    {"temperature": 0, "ignore_eos": True},
    {"temperature": 0.7, "seed": 3},
]


@dataclass(frozen=True)
class Served:
    answers: list[tuple[list[int], str | None]]
    """Tokens and finish reason for each prompt."""
    trees: list[RecordedTree]
    """All verified trees; empty for plain vLLM."""
    error: str = ""
    """Traceback, if the engine failed."""


def write_target(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(EXACT[name])
    for parameter, weight in target.named_parameters():
        # Their initial value is often 0, the same for all heads.
        if parameter.endswith("sinks"):
            torch.nn.init.normal_(weight)
        # Otherwise a model with tied embeddings repeats its last token.
        if name.startswith(("gemma-2", "gemma-3")) and "post_" in parameter:
            torch.nn.init.constant_(weight, 20.0)
    target.save_pretrained(folder)
    if name in ARCHITECTURES:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [ARCHITECTURES[name]]}))


def write_drafter(target: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(1)
    config = drafter_config(target, num_frames=3, label_length=3, condition_rank=8, initializer_range=0.2)
    CTCDrafter(config).save_pretrained(folder)


def serve(folder: Path, with_trees: bool) -> Served:
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    options |= {
        "max_model_len": CONTEXT,
        "block_size": 32,
        "max_num_seqs": len(PROMPTS),
        "kv_cache_memory_bytes": 1 << 25,
    }
    options |= OPTIONS.get(folder.name, {})
    if with_trees:
        options["speculative_config"] = {"method": "ctc", "model": str(folder / "drafter"), **TREES}
    llm = LLM(str(folder / "target"), **options)
    if with_trees:
        llm.collective_rpc(record_trees)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    params = [SamplingParams(**each, max_tokens=LENGTH) for each in SAMPLING]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    trees = llm.collective_rpc(recorded_trees)[0] if with_trees else []
    return Served([(list(each.token_ids), each.finish_reason) for each in outputs], trees)


def answer(folder: Path, how: str) -> None:
    try:
        served = serve(folder, how == "trees")
    except Exception:
        served = Served([], [], traceback.format_exc())
    (folder / f"{how}.pickle").write_bytes(pickle.dumps(served))


def main(how: str, folder: Path) -> None:
    """Serve each target in a fork of this process, because a process cannot start a second engine."""
    importlib.import_module("vllm.v1.engine.core")
    importlib.import_module("vllm.v1.worker.cpu_worker" if how == "plain" else "vllm_ctc_spec.engine.cpu_worker")
    for target in sorted(folder.iterdir()):
        process = multiprocessing.get_context("fork").Process(target=answer, args=(target, how))
        process.start()
        process.join()


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Pickled classes need this module's name, not __main__.
    from tests.engine import families

    families.main(sys.argv[1], Path(sys.argv[2]))
