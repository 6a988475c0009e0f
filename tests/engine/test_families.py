"""A tiny random target of each family, by plain vLLM and with trees; families that start-up refuses.

The drafter is untrained, because exactness does not depend on drafts. A tree of nearly all first tokens is accepted
now and then.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    FalconConfig,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)
from vllm.engine.arg_utils import EngineArgs

from tests.engine.families import (
    EXACT,
    GATED,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    NUM_NODES,
    OTHERWISE_IN_TRAINING,
    PROMPTS,
    SIZES,
    TOKENS,
    TREES,
    Served,
    write_drafter,
    write_target,
)
from tests.engine.probe import RecordedTree
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.drafter.drafting import draft_trees, emission_logits, head_of, set_tables_from
from vllm_ctc_spec.training.objective import DraftObjective

REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "llama 4": (
        Llama4TextConfig(**GATED | {"intermediate_size_mlp": INNER}, num_local_experts=2),
        "chunked local attention",
    ),
    "deepseek-v2": (DeepseekV2Config(**GATED), "MLA"),
    "qwen3-next": (Qwen3NextConfig(**GATED, head_dim=32), "hybrid or state-space"),
    "bloom": (BloomConfig(hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, **TOKENS), "ALiBi"),
    "falcon, alibi": (FalconConfig(**SIZES, multi_query=True, alibi=True), "ALiBi"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, with the answers of both engines."""
    folder = tmp_path_factory.mktemp("families")
    for name in EXACT:
        write_target(name, folder / name / "target")
        write_drafter(AutoConfig.from_pretrained(folder / name / "target"), folder / name / "drafter")
    for how in ("plain", "trees"):
        command = [sys.executable, "-m", "tests.engine.families", how, str(folder)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    return folder


@pytest.mark.families
@pytest.mark.parametrize("name", EXACT)
def test_a_family_is_served_exactly(name: str, served: Path) -> None:
    plain, trees = (answered(served / name / f"{how}.pickle") for how in ("plain", "trees"))
    assert trees.answers == plain.answers
    tokens = [token for answer, _ in plain.answers for token in answer]
    assert len(set(tokens)) > 12
    # Accepted tokens: all but the first of each prompt and the target's own of each step.
    assert len(tokens) - len(PROMPTS) - len(trees.trees) > 0
    if name not in OTHERWISE_IN_TRAINING:
        assert_trees_are_those_of_training(served / name, trees.trees)


def answered(path: Path) -> Served:
    served = pickle.loads(path.read_bytes())
    assert not served.error, served.error
    return served


@torch.inference_mode()
def assert_trees_are_those_of_training(folder: Path, recorded: list[RecordedTree]) -> None:
    """So the engine reads the hidden states, embeddings and LM head rows that training reads."""
    # Eager attention supports soft caps.
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    target = AutoModelForCausalLM.from_pretrained(folder / "target", **options).eval()
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
