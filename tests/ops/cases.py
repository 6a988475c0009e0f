"""Random steps of tree verification. The cache outside all contexts is NaN, so that a read there shows.

Letters: R requests, M query rows of the whole step, K key-value heads, D head size, B block size, P places of a path.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from vllm_ctc_spec.ops import reference
from vllm_ctc_spec.ops.tree_batch import TreeBatch
from vllm_ctc_spec.ops.triton.launch import Launch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
UNTOUCHED = 7.0
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e5m2),
    (torch.float32, torch.float8_e4m3fn),
]
"""Number types of a model and of its cache."""


@dataclass(frozen=True)
class Shape:
    num_rows: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_kv_heads: int
    group: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    soft_cap: float
    seed: int
    sliding_window: int = 0
    has_sinks: bool = False


@dataclass(frozen=True)
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    kv_cache: Tensor
    batch: TreeBatch
    scale: float
    sliding_window: int
    soft_cap: float
    sinks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    def run(self, attend: Callable[..., Tensor]) -> Tensor:
        out = torch.full_like(self.query, UNTOUCHED)
        optional = {name: getattr(self, name) for name in ("sliding_window", "soft_cap", "sinks", "k_scale", "v_scale")}
        returned = attend(self.query, self.key, self.value, self.kv_cache, self.batch, self.scale, out=out, **optional)
        assert returned is out
        return out

    def check(self, attend: Callable[..., Tensor]) -> None:
        """Compare with the plain version in float64. Rows of no request must stay unchanged."""
        exact = replace(self, query=self.query.double()).run(reference.tree_attention)
        torch.testing.assert_close(
            self.run(attend).double(),
            exact,
            rtol=0,
            atol=TOLERANCE[self.query.dtype],
            msg=lambda text: f"{text} {self}",
        )


def attend_with_xformers(
    query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: TreeBatch, scale: float, **optional: Any
) -> Tensor:
    """An `attend` of `Case.check`, for cases with nothing in `optional`."""
    from vllm_ctc_spec.ops.xformers import pad_batch, tree_attention

    out = optional.pop("out")
    assert not any(optional.values())
    slots = kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    return tree_attention(query, key, value, slots, pad_batch(batch, kv_cache.shape[2]), scale, out)


def make_case(shape: Shape, launch: Launch, device: str = "cpu") -> Case:
    """Tensors of a shape. The requests' rows are in random order, with rows of no request between them."""
    generator, rng = torch.Generator().manual_seed(shape.seed), random.Random(shape.seed)
    starts, masks = _lay_out_rows(shape, rng)
    normal = (len(masks), shape.num_kv_heads, shape.head_size)
    query = torch.randn(normal[0], normal[1] * shape.group, normal[2], generator=generator).to(shape.dtype)
    # Views of one wider row, as in vLLM's models.
    key, value = torch.randn(*normal[:2], 2 * normal[2], generator=generator).to(shape.dtype).chunk(2, dim=-1)
    kv_cache, block_table = _fill_cache(shape, rng, generator)
    is_fp8 = shape.cache_dtype.itemsize == 1
    # With the second, the largest values exceed float8_e4m3fn.
    k_scale, v_scale = (torch.tensor([0.75]), torch.tensor([0.005])) if is_fp8 else (None, None)
    batch = TreeBatch(
        row_starts=torch.tensor(starts, dtype=torch.int32),
        num_rows=torch.tensor(shape.num_rows, dtype=torch.int32),
        ancestor_masks=torch.tensor(masks, dtype=torch.int64),
        context_lens=torch.tensor(shape.context_lens, dtype=torch.int32),
        block_table=block_table,
        max_rows=max(1, *shape.num_rows),
        launch=launch,
    )
    scale = shape.head_size**-0.5
    sinks = torch.randn(query.shape[1], generator=generator) if shape.has_sinks else None
    features = shape.sliding_window, shape.soft_cap, sinks
    case = Case(query, key, value, kv_cache, batch, scale, *features, k_scale, v_scale)
    return move_fields(case, device)


def move_fields(record: Any, device: str) -> Any:
    """A frozen dataclass with its tensors on a device."""
    moved = {name: field.to(device) for name, field in vars(record).items() if isinstance(field, Tensor)}
    if isinstance(record, Case):
        moved["batch"] = move_fields(record.batch, device)
    return replace(record, **moved)


def _lay_out_rows(shape: Shape, rng: random.Random) -> tuple[list[int], list[int]]:
    """First row of each request, and every row's mask as a signed int64."""
    starts, masks = [0] * len(shape.num_rows), [0] * rng.randint(1, 3)
    for request in rng.sample(range(len(starts)), len(starts)):
        starts[request] = len(masks)
        if rng.random() < 0.2 and not shape.sliding_window:
            # All rows of the drafter see each other, and have no depth.
            masks += [-1] * shape.num_rows[request]
        else:
            ancestors: list[int] = []
            for row in range(shape.num_rows[request]):
                parent = ancestors[rng.randrange(row)] if row else 0
                ancestors.append(parent | 1 << row)
            masks += [mask - (mask >> 63 << 64) for mask in ancestors]
        masks += [0] * rng.randint(0, 2)
    return starts, masks


def _fill_cache(shape: Shape, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A cache [blocks, K, B, 2 * D] and a block table [R, blocks]. Block 0 and all slots outside contexts are NaN.

    Blocks before a request's window are block 0, as if vLLM had freed them.
    """
    num_blocks = [-(-length // shape.block_size) for length in shape.context_lens]
    free = list(range(1, 1 + sum(num_blocks)))
    rng.shuffle(free)
    table = torch.zeros(len(num_blocks), max(1, *num_blocks), dtype=torch.int32)
    # vLLM's layouts have the heads inside the slots, or the slots inside the heads.
    slots_first = torch.full((1 + len(free), shape.block_size, shape.num_kv_heads, 2 * shape.head_size), torch.nan)
    cache = slots_first.transpose(1, 2) if rng.random() < 0.5 else slots_first.transpose(1, 2).contiguous()
    for request, length in enumerate(shape.context_lens):
        first_seen = max(0, length + 1 - shape.sliding_window) if shape.sliding_window else 0
        for index in range(first_seen // shape.block_size, num_blocks[request]):
            block = table[request, index] = free.pop()
            filled = cache[block, :, : min(shape.block_size, length - index * shape.block_size)]
            filled.copy_(torch.randn(filled.shape, generator=generator))
    return cache.to(shape.cache_dtype), table


@st.composite
def shapes(draw: st.DrawFn, dtypes: list[tuple[torch.dtype, torch.dtype]]) -> Shape:
    """Small steps; dtypes: pairs of the model's and the cache's."""
    num_requests = draw(st.integers(1, 3))
    dtype, cache_dtype = draw(st.sampled_from(dtypes))
    return Shape(
        num_rows=tuple(draw(st.sampled_from([0, 1, 2, 5, 9, 17])) for _ in range(num_requests)),
        context_lens=tuple(draw(st.one_of(st.just(0), st.integers(1, 150))) for _ in range(num_requests)),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3])),
        head_size=draw(st.sampled_from([64, 80, 128])),
        block_size=draw(st.sampled_from([16, 48, 64])),
        dtype=dtype,
        cache_dtype=cache_dtype,
        soft_cap=draw(st.sampled_from([0.0, 1.5])),
        seed=draw(st.integers(0, 2**32)),
        # Shorter than paths of a tree, than a tile, than contexts, and longer than these.
        sliding_window=draw(st.sampled_from([0, 0, 1, 2, 3, 7, 16, 40, 100, 300])),
        has_sinks=draw(st.booleans()),
    )


@dataclass(frozen=True)
class Moves:
    """Caches [blocks, K, B, 2 * D] of L layers, with a different number in every place, and the moves [R, P]."""

    kv_caches: list[Tensor]
    sources: Tensor
    targets: Tensor

    def check(self, move: Callable[[list[Tensor], Tensor, Tensor], None]) -> None:
        expected = [kv_cache.clone() for kv_cache in self.kv_caches]
        reference.move_slots(expected, self.sources, self.targets)
        move(self.kv_caches, self.sources, self.targets)
        for found, wanted in zip(self.kv_caches, expected):
            assert torch.equal(found.view(torch.int8), wanted.view(torch.int8))


def make_moves(
    num_layers: int, num_requests: int, num_places: int, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> Moves:
    """Each request moves slots within its own blocks; sources and targets overlap. Half of the places are padding."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block_size, num_blocks = rng.choice([16, 48]), 5
    caches = [
        torch.randint(0, 2**7, (num_blocks * num_requests, block_size, 2, 2 * 64 * dtype.itemsize), generator=generator)
        .to(torch.uint8)
        .view(dtype)
        .to(device)
        .transpose(1, 2)
        for _ in range(num_layers)
    ]
    if rng.random() < 0.5:
        caches = [cache.contiguous() for cache in caches]
    slots = torch.arange(num_blocks * num_requests * block_size).unflatten(0, (num_requests, -1))
    # Few distinct slots, so that most sources are targets as well.
    some = slots.gather(1, _random_order(slots, generator))[:, : num_places + 2]
    sources, targets = (some.gather(1, _random_order(some, generator))[:, :num_places] for _ in range(2))
    sources[torch.rand(sources.shape, generator=generator) < 0.5] = -1
    return Moves(caches, sources.to(device), targets.to(device))


def random_moves(dtypes: list[torch.dtype]) -> st.SearchStrategy[Moves]:
    return st.builds(
        make_moves,
        num_layers=st.integers(1, 3),
        num_requests=st.integers(1, 3),
        num_places=st.integers(1, 9),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**32),
    )


def _random_order(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator).argsort(-1)
