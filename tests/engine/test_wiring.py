"""Masks, positions and cache slots of tree rows, compared with plain passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm import _custom_ops as ops

from tests.engine.conftest import NUM_NODES, engine, generate
from tests.engine.probe import RecordedTree, record_trees, recorded_trees
from vllm_ctc_spec.config import SpecOptions
from vllm_ctc_spec.drafter.checkpoint import load_drafter
from vllm_ctc_spec.drafter.drafting import set_tables_from
from vllm_ctc_spec.engine.attention.cpu import ISA, write_cache
from vllm_ctc_spec.engine.host_tree import HostTree
from vllm_ctc_spec.ops.cpu.kernels import tree_attention
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.reference import draft, run_target

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 4, 2, 64, 32
CONTEXT = 45
TREE = HostTree([0] * 6, [0, 0, 1, 1, 2, 3], [1, 1, 2, 2, 2, 3], [0.5, 0.4, 0.3, 0.2, 0.2, 0.1])
SCALE = HEAD_SIZE**-0.5


class Rows:
    """A paged context and the rows of one tree, with random contents."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        num_rows = len(TREE.tokens) + 1

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.cache = torch.zeros(6, KV_HEADS, BLOCK, 2 * HEAD_SIZE)
        self.blocks = torch.tensor([[4, 1, 3]])
        positions = torch.arange(CONTEXT)
        self.slots = self.blocks[0][positions // BLOCK] * BLOCK + positions % BLOCK
        key, value = (random(CONTEXT, KV_HEADS, HEAD_SIZE) for _ in range(2))
        write_cache(self.cache, self.slots, key, value, ISA)
        self.query = random(1, num_rows, HEADS, HEAD_SIZE)
        self.key = random(1, num_rows, KV_HEADS, HEAD_SIZE)
        self.value = random(1, num_rows, KV_HEADS, HEAD_SIZE)

    def attend(self, masks: list[int], **features: Any) -> torch.Tensor:
        """[Q, H, D]"""
        start, count, context = torch.tensor([[0], [len(masks)], [CONTEXT]], dtype=torch.int32)
        batch = TreeBatch(start, count, torch.tensor(masks), context, self.blocks.int(), len(masks))
        rows = (self.query[0], self.key[0], self.value[0])
        return tree_attention(*rows, self.cache, False, batch, SCALE, torch.empty_like(self.query[0]), **features)

    def attend_causally(
        self, rows: list[int], sliding_window: int = -1, soft_cap: float = 0.0, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """vLLM's kernel over the context followed by `rows` as a sequence."""
        cache = self.cache.clone()
        positions = torch.arange(CONTEXT, CONTEXT + len(rows))
        slots = self.blocks[0][positions // BLOCK] * BLOCK + positions % BLOCK
        write_cache(cache, slots, self.key[0, rows].contiguous(), self.value[0, rows].contiguous(), ISA)
        starts, lens = torch.tensor([0, len(rows)], dtype=torch.int32), torch.tensor([CONTEXT + len(rows)]).int()
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_SIZE,
            seq_lens=lens,
            dtype=torch.float32,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=sliding_window,
            isa=ISA,
            enable_kv_split=False,
        )
        key_cache, value_cache = cache.view(6, KV_HEADS, 2 * BLOCK, HEAD_SIZE).chunk(2, dim=2)
        output = torch.empty(len(rows), HEADS, HEAD_SIZE)
        ops.cpu_attention_with_kv_cache(
            query=self.query[0, rows].contiguous(),
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=lens,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=sliding_window,
            block_table=self.blocks.int(),
            softcap=soft_cap,
            scheduler_metadata=plan,
            s_aux=sinks,
        )
        return output


def test_with_a_causal_mask_our_kernel_equals_vllms() -> None:
    rows = Rows()
    chain = HostTree.chain(TREE.tokens)
    torch.testing.assert_close(
        rows.attend(chain.ancestor_masks()), rows.attend_causally(list(range(7))), rtol=1e-5, atol=1e-5
    )


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
# With windows up to 3 the node of depth 3 does not see the anchor.
FEATURES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 1},
    {"sliding_window": 3, "sinks": SINKS},
    {"sliding_window": 40, "soft_cap": 0.7},
    {"soft_cap": 0.7, "sinks": SINKS},
]


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_each_node_attends_as_if_its_ancestors_were_the_text(features: dict[str, Any]) -> None:
    rows = Rows()
    attended = rows.attend(TREE.ancestor_masks(), **features)
    for node, mask in enumerate(TREE.ancestor_masks()):
        path = [other for other in range(7) if mask >> other & 1]
        expected = rows.attend_causally(path, **features)[-1]
        torch.testing.assert_close(attended[node], expected, rtol=1e-5, atol=1e-5)


def test_hiding_one_ancestor_changes_that_node_and_no_other() -> None:
    rows = Rows()
    masks = TREE.ancestor_masks()
    full = rows.attend(masks)
    for ancestor in (0, 1, 3):
        hidden = rows.attend([*masks[:6], masks[6] & ~(1 << ancestor)])
        torch.testing.assert_close(hidden[:6], full[:6])
        assert (hidden[6] - full[6]).abs().max() > 1e-3


@pytest.fixture(scope="module")
def recorded(pair, prompts: list[list[int]]) -> list[RecordedTree]:
    """Every branching tree of several steps of the real engine."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with engine(pair, {}) as llm:
            llm.collective_rpc(record_trees)
            generate(llm, prompts[:6], SamplingParams(temperature=0, max_tokens=12))
            [every] = llm.collective_rpc(recorded_trees)
    branching = [each for each in every if not each.tree.is_chain]
    assert len(branching) > 10
    return branching


def test_logits_of_every_node_equal_a_plain_run_over_its_ancestors(pair, recorded: list[RecordedTree]) -> None:
    """For accepted nodes and others, after several steps."""
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()
    for each in recorded[::4]:
        for node, mask in enumerate(each.tree.ancestor_masks()):
            path = [each.tree.tokens[other - 1] for other in range(1, node + 1) if mask >> other & 1]
            with torch.inference_mode():
                expected = target(torch.tensor([[*each.text, *path]])).logits[0, -1]
            torch.testing.assert_close(each.logits[node], expected, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_trees_are_those_of_the_reference_loop(pair, recorded: list[RecordedTree]) -> None:
    """So the engine's drafter reads the layers that training reads, and its cache holds the whole context."""
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()
    drafter = load_drafter(str(pair.drafter), torch.float32)
    layers = drafter.config.target_layers
    assert layers
    set_tables_from(drafter, target)
    for each in recorded[::4]:
        hidden = run_target(target, layers, torch.tensor([each.text[:-1]]))
        tree = draft(target, drafter, hidden, each.text[-2:], NUM_NODES, SpecOptions())
        psi = torch.tensor(each.tree.probabilities, dtype=torch.float32)
        torch.testing.assert_close(psi, tree.prefix_logp.exp()[0, : len(psi)], rtol=1e-3, atol=1e-4)
        assert each.tree.tokens[0] == int(tree.tokens[0, 0])
