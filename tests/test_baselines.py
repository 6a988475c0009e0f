"""The baselines' trainers: their checkpoints fill vLLM's own modules, and they learn what serving asks of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.training.tiny_models import VOCAB, tiny_target
from vllm_ctc_spec.training.loop import Budget
from vllm_ctc_spec.training.models import load_target

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "baselines"))

from eagle import Eagle, Eagle3, EagleHead
from train import train

METHODS = {"medusa": "medusa", "eagle": "eagle", "eagle3": "eagle3", "draft": "draft_model"}
SHARED = {
    "medusa": set(),
    "eagle": {"model.embed_tokens.weight"},
    "eagle3": {"model.embed_tokens.weight", "lm_head.weight"},
    "draft": set(),
}
"""Parameters that vLLM replaces by the target's own when the checkpoint lacks them."""

SERVED = [kind for kind in METHODS if kind != "medusa" or importlib.util.find_spec("vllm.v1.spec_decode.medusa")]
"""vLLM 0.33 has no Medusa; 0.32 serves what was trained."""

HIDDEN, LENGTH, PERIOD = 64, 30, 10


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("target")
    tiny_target(tied=False, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=7, head_dim=32).save_pretrained(
        folder
    )
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(target_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text that counts up and starts again: every baseline can learn it."""
    folder = tmp_path_factory.mktemp("baselines")
    rows = [
        {"prompt_token_ids": [1], "token_ids": [(i + j) % PERIOD + 2 for j in range(LENGTH)]} for i in range(PERIOD)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {kind: train(kind, target_path, folder / "rows.jsonl", folder / kind, Budget(20)) for kind in METHODS}


@pytest.fixture
def parallel(tmp_path: Path) -> Iterator[None]:
    """What vLLM's layers need before they can be built: a world of one process."""
    from vllm.distributed import parallel_state

    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def vllm_module(kind: str, target_path: str, folder: Path, rendezvous: Path) -> nn.Module:
    """The module that vLLM would load `folder` into, filled with NaN."""
    from vllm.config import set_current_vllm_config
    from vllm.config.utils import replace
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    spec: dict[str, Any] = {"method": METHODS[kind], "model": str(folder), "num_speculative_tokens": 5}
    config = EngineArgs(
        model=target_path, dtype="float32", max_model_len=128, enforce_eager=True, speculative_config=spec
    ).create_engine_config()
    drafter = config.speculative_config.draft_model_config
    if kind == "draft":
        # As vLLM does: a draft model reads it as any model would.
        config = replace(config, model_config=drafter)
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        module = initialize_model(config, model_config=drafter)
    for weight in module.parameters():
        nn.init.constant_(weight, float("nan"))
    return module


@pytest.mark.parametrize("kind", METHODS)
def test_the_loss_falls(trained, kind):
    losses = json.loads((trained[kind] / "training.json").read_text())["losses"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", SERVED)
def test_the_checkpoint_fills_vllms_module_and_nothing_is_left_over(kind, target_path, trained, tmp_path, parallel):
    module = vllm_module(kind, target_path, trained[kind], tmp_path / "rendezvous")
    weights = load_file(trained[kind] / "model.safetensors")
    module.load_weights(weights.items())
    parameters = dict(module.named_parameters())
    assert {name for name, weight in parameters.items() if weight.isnan().any()} == SHARED[kind]
    filled = sum(weight.numel() for name, weight in parameters.items() if name not in SHARED[kind])
    assert filled == sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize("head_class", [Eagle, Eagle3])
def test_an_unrolled_step_is_a_plain_causal_pass_over_what_serving_would_have_seen(head_class, target_path):
    """Rows of the target's features up to the anchor, then of the head's own: the last row's output."""
    torch.manual_seed(0)
    head: EagleHead = head_class(load_target(target_path).float())
    tokens, features = torch.randint(VOCAB, (1, 12)), torch.randn(1, 12, HIDDEN)
    anchors = torch.tensor([[4, 6]])
    labels = torch.stack([tokens[0, anchor + 1 : anchor + 4] for anchor in anchors[0]])[None]
    outputs = head.unrolled(tokens, features, anchors, labels)
    for column, anchor in enumerate(anchors[0].tolist()):
        seen = features[0, :anchor]
        for step in range(3):
            last = plain_pass(head, tokens[0, 1 : len(seen) + 1], seen)[-1]
            torch.testing.assert_close(outputs[step][0, column], last, atol=1e-4, rtol=1e-4)
            seen = torch.cat((seen, last[None]))


def plain_pass(head: EagleHead, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[L, H] of vLLM's decoder layer over one sequence, written out."""
    from vllm_ctc_spec.drafter.modeling import rotate

    x, residual = head.inputs(head.target.get_input_embeddings()(tokens), features)
    attention, positions = head.layer.self_attn, torch.arange(len(tokens))
    query, key, value = (
        project(x).unflatten(-1, (-1, head.config.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = (rotate(part, positions, head.config.rope_parameters["rope_theta"]) for part in (query, key))
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    residual = residual + attention.o_proj(mixed.flatten(1))
    return residual + head.layer.mlp(head.layer.post_attention_layernorm(residual))
