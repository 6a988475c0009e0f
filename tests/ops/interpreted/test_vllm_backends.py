"""Our kernels behind vLLM's TRITON_ATTN backend, whose own kernels are interpreted as well."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_ctc_spec.ops import reference
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.launch import Launch

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 4, 2, 64, 16
SCALE = HEAD_SIZE**-0.5
CONTEXTS, COUNTS = [21, 40, 17], [5, 7, 3]
STARTS = [0, 5, 12]
BLOCKS = torch.tensor([[1, 5, 0, 0], [8, 2, 7, 3], [4, 9, 0, 0]], dtype=torch.int32)
CAUSAL = [(2 << row) - 1 for row in range(7)]
TREE = [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b100101, 0b1001011]


@pytest.fixture(scope="module", autouse=True)
def vllms_kernels() -> None:
    from tests.engine.interpreted import interpret_vllms_kernels

    interpret_vllms_kernels()


FEATURES: list[dict[str, Any]] = [
    {},
    {"sliding_window": 3, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    {"sliding_window": 30, "soft_cap": 0.7},
]


def make_layer(
    slots_first: bool,
    dtype: str = "auto",
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Any:
    """An attention layer with an empty cache, in one of the physical orders that vLLM has."""
    from vllm_ctc_spec.engine.attention.triton import TreeTritonAttentionBackend

    make = TreeTritonAttentionBackend.get_impl_cls()
    impl = make(HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, sliding_window, dtype, soft_cap, sinks=sinks)
    kv_cache = torch.zeros(10, BLOCK, KV_HEADS, 2 * HEAD_SIZE, dtype=torch.float32 if dtype == "auto" else torch.uint8)
    kv_cache = kv_cache.transpose(1, 2)
    scales = {name: torch.tensor(1.0) for name in ("_q_scale", "_k_scale", "_v_scale")}
    return SimpleNamespace(
        impl=impl,
        kv_cache=kv_cache if slots_first else kv_cache.contiguous(),
        num_heads=HEADS,
        dtype=torch.float32,
        get_attn_backend=lambda: TreeTritonAttentionBackend,
        **scales,
    )


def slots_of(request: int, first: int, count: int) -> Tensor:
    positions = torch.arange(first, first + count)
    return BLOCKS[request, positions // BLOCK].long() * BLOCK + positions % BLOCK


def random_rows(count: int, heads: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, heads, HEAD_SIZE, generator=generator)


class Step:
    """A prompt chunk, a tree and a chain, each after a context of its own."""

    def __init__(self, slots_first: bool = True, **features: Any) -> None:
        from vllm_ctc_spec.engine.attention.triton import TritonTreeAttention

        generator = torch.Generator().manual_seed(5)
        self.features = features
        self.layer = make_layer(slots_first, **features)
        self.attention = TritonTreeAttention([self.layer])
        for request, count in enumerate(CONTEXTS):
            own = (random_rows(count, KV_HEADS, generator) for _ in range(2))
            self.layer.impl.do_kv_cache_update(self.layer, *own, self.layer.kv_cache, slots_of(request, 0, count))
        self.query = random_rows(sum(COUNTS), HEADS, generator)
        self.key, self.value = (random_rows(sum(COUNTS), KV_HEADS, generator) for _ in range(2))
        slots = [slots_of(request, *rows) for request, rows in enumerate(zip(CONTEXTS, COUNTS))]
        self.slots = torch.cat(slots)

    def metadata(self) -> Any:
        from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

        segments = torch.empty(1, HEADS, 16, HEAD_SIZE)
        return TritonAttentionMetadata(
            num_actual_tokens=sum(COUNTS),
            max_query_len=max(COUNTS),
            query_start_loc=torch.tensor([*STARTS, sum(COUNTS)], dtype=torch.int32),
            max_seq_len=47,
            seq_lens=torch.tensor(CONTEXTS).int() + torch.tensor(COUNTS).int(),
            block_table=BLOCKS,
            slot_mapping=self.slots,
            seq_threshold_3D=0,
            num_par_softmax_segments=16,
            softmax_segm_output=segments,
            softmax_segm_max=segments[..., 0],
            softmax_segm_expsum=segments[..., 0],
            causal=True,
        )

    def expected(self, masks: list[int]) -> Tensor:
        batch = make_batch(STARTS, COUNTS, masks, CONTEXTS, BLOCKS)
        own = self.query.double(), self.key, self.value
        out = torch.zeros_like(own[0])
        return reference.tree_attention(*own, self.layer.kv_cache, batch, SCALE, out, **self.features).float()


def make_batch(
    starts: list[int], counts: list[int], masks: list[int], contexts: list[int], blocks: Tensor
) -> TreeBatch:
    def numbers(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    rows = numbers(starts), numbers(counts), numbers(masks, torch.int64)
    return TreeBatch(*rows, numbers(contexts), blocks, max(counts), Launch(16, 16, 4, 2))


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("slots_first", [True, False])
def test_tree_rows_see_their_ancestors_and_all_others_are_causal(slots_first: bool, features: dict[str, Any]) -> None:
    from vllm_ctc_spec.engine.attention.interface import StepTrees

    step = Step(slots_first, **features)
    metadata, out = step.metadata(), torch.full_like(step.query, torch.nan)
    step.attention.attach([metadata], StepTrees([1], [5], [CONTEXTS[1]], [TREE], sum(COUNTS)))
    layer = step.layer
    layer.impl.do_kv_cache_update(layer, step.key, step.value, layer.kv_cache, step.slots)
    layer.impl.forward(layer, step.query, step.key, step.value, layer.kv_cache, metadata, out)
    torch.testing.assert_close(out, step.expected([*CAUSAL[:5], *TREE, *CAUSAL[:3]]), rtol=1e-5, atol=1e-5)


def test_a_step_of_trees_alone_needs_no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from vllm_ctc_spec.engine.attention.interface import StepTrees

    step = Step()
    masks = [CAUSAL[:5], TREE, [0b1, 0b11, 0b101]]
    metadata, out = step.metadata(), torch.full_like(step.query, torch.nan)
    step.attention.attach([metadata], StepTrees([0, 1, 2], STARTS, CONTEXTS, masks, sum(COUNTS)))
    monkeypatch.setattr(TritonAttentionImpl, "forward", None)
    step.layer.impl.forward(step.layer, step.query, step.key, step.value, step.layer.kv_cache, metadata, out)
    torch.testing.assert_close(out, step.expected([mask for own in masks for mask in own]), rtol=1e-5, atol=1e-5)


def test_the_drafters_rows_see_their_context_and_one_another() -> None:
    step, generator = Step(), torch.Generator().manual_seed(6)
    cache = torch.zeros_like(step.layer.kv_cache)
    requests, lens = torch.tensor([2, 1]), torch.tensor([17, 40])
    for request, count in zip(requests.tolist(), lens.tolist()):
        own = (random_rows(count, KV_HEADS, generator) for _ in range(2))
        step.attention.write(cache, slots_of(request, 0, count), *own)
    query = random_rows(10, 6, generator).unflatten(0, (2, 5))
    key, value = (random_rows(10, KV_HEADS, generator).unflatten(0, (2, 5)) for _ in range(2))
    frames = step.attention.frames(step.attention.context(BLOCKS, requests, lens), 5, 6, query.dtype)
    found = step.attention.attend_frames(query, key, value, cache, frames, SCALE)
    batch = make_batch([0, 5], [5, 5], [0b11111] * 10, lens.tolist(), BLOCKS[requests])
    query, key, value = query.flatten(0, 1).double(), key.flatten(0, 1), value.flatten(0, 1)
    expected = reference.tree_attention(query, key, value, cache, batch, SCALE, torch.empty_like(query))
    torch.testing.assert_close(found.flatten(0, 1), expected.float(), rtol=1e-5, atol=1e-5)


def test_moved_rows_are_read_before_any_is_written() -> None:
    step = Step()
    before = step.layer.kv_cache.clone()
    step.attention.move_rows([step.slots], [[2, 4], [], [14]], [[1, 2], [], [13]])
    for source, target in ((2, 1), (4, 2), (14, 13)):
        (at, offset), (to, place) = (divmod(int(step.slots[row]), BLOCK) for row in (source, target))
        assert torch.equal(step.layer.kv_cache[to, :, place], before[at, :, offset])
        before[to, :, place] = step.layer.kv_cache[to, :, place]
    assert torch.equal(step.layer.kv_cache, before)


def test_each_kv_group_has_blocks_of_its_own() -> None:
    """The drafter's group, between those of the target, is left alone."""
    from dataclasses import replace

    from vllm_ctc_spec.engine.attention.interface import StepTrees
    from vllm_ctc_spec.engine.attention.triton import TritonTreeAttention

    first, second = Step(), Step()
    attention = TritonTreeAttention([first.layer], [], [second.layer])
    # The second group's blocks are the first's in another order.
    order = torch.randperm(len(second.layer.kv_cache), generator=torch.Generator().manual_seed(3))
    second.layer.kv_cache[order] = second.layer.kv_cache.clone()
    slots = order[second.slots // BLOCK] * BLOCK + second.slots % BLOCK
    metadata = [
        first.metadata(),
        replace(second.metadata(), block_table=order[BLOCKS.long()].int(), slot_mapping=slots),
    ]
    attention.attach(metadata, StepTrees([0, 1, 2], STARTS, CONTEXTS, [CAUSAL[:5], TREE, CAUSAL[:3]], sum(COUNTS)))
    for step, own, at in zip((first, second), metadata, (first.slots, slots), strict=True):
        out = torch.full_like(step.query, torch.nan)
        step.layer.impl.do_kv_cache_update(step.layer, step.key, step.value, step.layer.kv_cache, at)
        step.layer.impl.forward(step.layer, step.query, step.key, step.value, step.layer.kv_cache, own, out)
        torch.testing.assert_close(out, first.expected([*CAUSAL[:5], *TREE, *CAUSAL[:3]]), rtol=1e-5, atol=1e-5)
    attention.move_rows([first.slots, first.slots, slots], [[2, 4], [], [14]], [[1, 2], [], [13]])
    assert torch.equal(second.layer.kv_cache[order], first.layer.kv_cache)


def test_a_float8_cache_and_query_are_read_with_their_scales() -> None:
    from vllm_ctc_spec.engine.attention.interface import TreeRows

    layer, generator = make_layer(True, "fp8"), torch.Generator().manual_seed(7)
    float8 = torch.float8_e4m3fn
    stored = torch.randn(layer.kv_cache.shape, generator=generator).to(float8)
    layer.kv_cache.copy_(stored.view(torch.uint8))
    layer._k_scale, layer._v_scale, layer._q_scale_float = torch.tensor(0.75), torch.tensor(0.5), 0.25
    query = random_rows(7, HEADS, generator).to(float8)
    key, value = (random_rows(7, KV_HEADS, generator) for _ in range(2))
    batch = make_batch([0], [7], TREE, [40], BLOCKS[1:2])
    out = torch.empty(7, HEADS, HEAD_SIZE)
    metadata = SimpleNamespace(tree_rows=TreeRows(batch, are_whole_step=True))
    layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, out)
    scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
    own = query.double() * 0.25, key, value
    expected = reference.tree_attention(*own, stored, batch, SCALE, torch.empty_like(own[0]), **scales)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)


def test_no_batch_needs_a_kernel_that_was_not_warmed_up() -> None:
    from vllm_ctc_spec.engine.attention.interface import PagedContext
    from vllm_ctc_spec.ops.triton.attention import kernels_of

    attention = Step().attention
    seen = []
    attention.layer.impl.kernel = lambda *arguments, **scales: seen.append(arguments[4])
    attention.warm_up(40, HEADS, 5000, is_target=True)
    kernels = set().union(*(kernels_of(batch.launch, batch.max_rows) for batch in seen))
    assert len(seen) <= len(kernels)
    for num_requests in (1, 3, 50):
        for num_rows in range(1, 41):
            for length in (1, 700, 3000, 5000):
                table = torch.zeros(num_requests, -(-length // BLOCK), dtype=torch.int32)
                context = PagedContext(table, torch.full((num_requests,), length, dtype=torch.int32))
                batch = attention.frames(context, num_rows, HEADS, torch.float32)
                assert kernels_of(batch.launch, num_rows) <= kernels


def test_each_kind_of_layer_is_warmed_up_once() -> None:
    from vllm_ctc_spec.engine.attention.triton import TritonTreeAttention

    layers = [make_layer(True, **features) for features in [{}, *FEATURES]]
    seen: list[dict[str, Any]] = []
    for layer in layers:
        layer.impl.kernel = lambda *arguments, **features: seen.append(features)
    attention = TritonTreeAttention(layers)
    attention.warm_up(1, HEADS, 40, is_target=True)
    assert seen == FEATURES
    attention.warm_up(1, HEADS, 40, is_target=False)
    assert seen == [*FEATURES, {}]


def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ctc_spec.engine.attention.triton import TritonTreeAttention

    layer = make_layer(True)
    write = layer.impl.do_kv_cache_update
    layer.impl.do_kv_cache_update = lambda layer, key, value, *rest: write(layer, value, key, *rest)
    with pytest.raises(RuntimeError, match=r"K/V cache of TRITON_ATTN.*not laid out"):
        TritonTreeAttention([layer])


@pytest.mark.parametrize("slots_first", [True, False])
def test_xformers_reads_caches_in_which_heads_lie_inside_of_slots(slots_first: bool) -> None:
    from tests.engine.interpreted import allow_xformers_on_a_cpu
    from vllm_ctc_spec.engine.attention.choice import tree_attention_of
    from vllm_ctc_spec.engine.attention.interface import StepTrees

    allow_xformers_on_a_cpu()
    step = Step(slots_first)
    layer = step.layer
    if not slots_first:
        with pytest.raises(ValueError, match=r"attention_kernel='xformers'.*Set VLLM_KV_CACHE_LAYOUT=NHD"):
            tree_attention_of([[layer]], "xformers")
        return
    attention = tree_attention_of([[layer]], "xformers")
    metadata, out = step.metadata(), torch.full_like(step.query, torch.nan)
    attention.attach([metadata], StepTrees([1, 2], [5, 12], CONTEXTS[1:], [TREE, [0b1, 0b11, 0b101]], sum(COUNTS)))
    layer.impl.do_kv_cache_update(layer, step.key, step.value, layer.kv_cache, step.slots)
    layer.impl.forward(layer, step.query, step.key, step.value, layer.kv_cache, metadata, out)
    expected = step.expected([*CAUSAL[:5], *TREE, 0b1, 0b11, 0b101])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", FEATURES[1:], ids=str)
def test_xformers_is_refused_for_what_it_does_not_compute(features: dict[str, Any]) -> None:
    from tests.engine.interpreted import allow_xformers_on_a_cpu
    from vllm_ctc_spec.engine.attention.choice import tree_attention_of

    allow_xformers_on_a_cpu()
    with pytest.raises(ValueError, match=r"attention_kernel='xformers': .* a sliding window.*Leave it out"):
        tree_attention_of([[make_layer(True), make_layer(True, **features)]], "xformers")


def test_scales_of_each_head_are_refused() -> None:
    from vllm_ctc_spec.engine.attention.triton import TritonTreeAttention

    layer = make_layer(True)
    layer._k_scale = torch.ones(KV_HEADS)
    with pytest.raises(ValueError, match="scales of each head"):
        TritonTreeAttention([layer])
