"""One tiny random target of each family, by vLLM and by vLLM with trees; families that are refused at start-up.

The drafter is untrained: exactness does not depend on what it drafts, and a tree of nearly all first tokens is accepted
now and then.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    StableLmConfig,
    Starcoder2Config,
)
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from tests.engine.conftest import IN_CORE, complete
from tests.engine.probe import RecordedTree, record_trees, recorded_trees
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of, set_tables_from
from vllm_ctc_spec.engine.lifetime import started
from vllm_ctc_spec.engine.metrics import read_tree_metrics
from vllm_ctc_spec.training.models import drafter_config
from vllm_ctc_spec.training.objective import DraftObjective

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
    "starcoder2": Starcoder2Config(**GATED),
    "stablelm": StableLmConfig(**GATED),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=INNER),
    "gpt-2": GPT2Config(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, initializer_range=0.2, **TOKENS
    ),
    "opt": OPTConfig(**SIZES | {"pad_token_id": 1}, ffn_dim=INNER, word_embed_proj_dim=HIDDEN, init_std=0.2),
    "falcon": FalconConfig(**SIZES, multi_query=True, alibi=False),
    # vLLM's own model class; transformers has none, and its weights have Llama's names.
    "minicpm": LlamaConfig(**GATED, scale_emb=3, scale_depth=1.4, dim_model_base=32),
}
ARCHITECTURES = {"minicpm": "MiniCPMForCausalLM"}

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "gemma 2": (Gemma2Config(**GATED, head_dim=32), "sliding-window attention"),
    "gemma 3": (Gemma3TextConfig(**GATED, head_dim=32), "sliding-window attention"),
    "mistral, sliding window": (MistralConfig(**GATED, sliding_window=32), "sliding-window attention"),
    "qwen2, sliding window": (
        Qwen2Config(**GATED, use_sliding_window=True, sliding_window=32, max_window_layers=1),
        "sliding-window attention",
    ),
    "gpt-oss": (GptOssConfig(**GATED, head_dim=32, num_local_experts=4), "sliding-window attention"),
    "deepseek-v2": (DeepseekV2Config(**GATED), "MLA"),
    "qwen3-next": (Qwen3NextConfig(**GATED, head_dim=32), "hybrid or state-space"),
    "bloom": (BloomConfig(hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, **TOKENS), "ALiBi"),
    "falcon, alibi": (FalconConfig(**SIZES, multi_query=True, alibi=True), "ALiBi"),
}

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4, 6]]
LENGTH = 24
SAMPLING = [
    SamplingParams(temperature=0, max_tokens=LENGTH),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, repetition_penalty=1.2, presence_penalty=0.3, max_tokens=LENGTH),
    SamplingParams(temperature=0.7, top_k=20, min_p=0.02, seed=2, max_tokens=LENGTH),
    SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True),
]


def write_target(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(EXACT[name]).save_pretrained(folder)
    if name in ARCHITECTURES:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [ARCHITECTURES[name]]}))


def write_drafter(target: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(1)
    config = drafter_config(target, num_frames=3, label_length=3, condition_rank=8, initializer_range=0.2)
    CTCDrafter(config).save_pretrained(folder)


@contextmanager
def engine(target: Path, spec: dict[str, Any] | None) -> Iterator[LLM]:
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "distributed_executor_backend": IN_CORE}
    options |= {"max_model_len": CONTEXT, "max_num_seqs": len(PROMPTS), "kv_cache_memory_bytes": 1 << 25}
    options |= {"skip_tokenizer_init": True, "disable_log_stats": False, "speculative_config": spec}
    with started(str(target), **options) as llm:
        yield llm
        llm.llm_engine.engine_core.shutdown(timeout=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_served_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    write_target(name, tmp_path / "target")
    write_drafter(AutoConfig.from_pretrained(tmp_path / "target"), tmp_path / "drafter")
    with engine(tmp_path / "target", None) as llm:
        expected = complete(llm, PROMPTS, SAMPLING)
    with engine(tmp_path / "target", {"method": "ctc", "model": str(tmp_path / "drafter"), **TREES}) as llm:
        llm.collective_rpc(record_trees)
        answers = complete(llm, PROMPTS, SAMPLING)
        metrics = read_tree_metrics(llm)
        [recorded] = llm.collective_rpc(recorded_trees)
    assert answers == expected
    assert len({token for answer in expected for token in answer.tokens}) > 12
    assert metrics is not None and metrics.acceptance_length > 1.1
    if name not in ARCHITECTURES:
        assert_trees_are_those_of_training(tmp_path, recorded)


@torch.inference_mode()
def assert_trees_are_those_of_training(folder: Path, recorded: list[RecordedTree]) -> None:
    """So the engine reads the hidden states, embeddings and rows of the LM head that training reads."""
    target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    drafter = load_drafter(str(folder / "drafter"), torch.float32)
    set_tables_from(drafter, target)
    head = head_of(drafter, target.get_output_embeddings().weight)
    assert len(recorded) > 8
    for each in recorded[::8]:
        anchor = torch.tensor([[len(each.text) - 1]])
        draft = DraftObjective(drafter, target).draft(torch.tensor([each.text]), anchor).of(anchor >= 0)
        logits = emission_logits(drafter, draft.frames, head)
        tree = draft_trees(drafter, draft, logits, NUM_NODES, SpecOptions(candidates=TREES["candidates"]))
        psi = torch.tensor(each.tree.probabilities)
        torch.testing.assert_close(psi, tree.prefix_logp.exp()[0, : len(psi)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("config", "feature"), REFUSED.values(), ids=REFUSED)
def test_a_family_that_trees_do_not_fit_is_refused_by_name(
    config: PreTrainedConfig, feature: str, tmp_path: Path
) -> None:
    write_drafter(EXACT["llama"], tmp_path / "drafter")
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(tmp_path / "target")
    spec = {"method": "ctc", "model": str(tmp_path / "drafter")}
    with pytest.raises(ValueError, match=f"target '[^']*/target' has .*{feature}.*Serve it without speculative_config"):
        EngineArgs(str(tmp_path / "target"), skip_tokenizer_init=True, speculative_config=spec).create_engine_config()
