"""A drafter of frequent tokens only, in the real engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from tests.engine.conftest import complete, engine
from tests.engine.probe import draft_heads, record_trees, recorded_trees
from tests.tiny_pair import TinyPair
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.engine.draft_head import find_lm_head
from vllm_ctc_spec.engine.metrics import read_tree_metrics
from vllm_ctc_spec.training.data import most_frequent, read_rows

NUM_DRAFTED = 160


@pytest.fixture
def frequent(pair: TinyPair, tmp_path: Path) -> Path:
    """The pair's drafter, limited to its target's most frequent tokens."""
    drafter = load_drafter(str(pair.drafter), torch.float32)
    rows = read_rows(pair.rows, AutoTokenizer.from_pretrained(pair.target), 512)
    drafter.draft_only(most_frequent(rows, drafter.config.vocab_size, NUM_DRAFTED))
    drafter.save_pretrained(tmp_path)
    return tmp_path


def test_only_frequent_tokens_are_drafted_and_no_token_changes(
    pair: TinyPair, frequent: Path, plain: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    params = SamplingParams(temperature=0, max_tokens=32)
    drafted = load_drafter(str(frequent), torch.float32).draft_vocab
    with engine(pair, {"model": str(frequent)}) as llm:
        llm.collective_rpc(record_trees)
        answers = complete(llm, prompts, params)
        [trees] = llm.collective_rpc(recorded_trees)
        metrics = read_tree_metrics(llm)
        [products] = llm.collective_rpc(draft_heads)
    assert answers == complete(plain, prompts, params)
    proposed = {token for each in trees for token in each.tree.tokens}
    assert len(proposed) > NUM_DRAFTED // 4
    assert proposed <= set(drafted.tolist())
    assert metrics is not None and metrics.acceptance_length > 1.2

    expected = products.pop("target")[:, drafted]
    for name, product in products.items():
        torch.testing.assert_close(product, expected, msg=f"{name}: {{}}".format)


def test_a_target_without_vllms_logits_processor_is_refused() -> None:
    class Headless(nn.Module):
        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    with pytest.raises(ValueError, match="target Headless computes its logits without vLLM's LogitsProcessor"):
        find_lm_head(Headless(), SimpleNamespace(norm=SimpleNamespace(weight=torch.zeros(4))))
