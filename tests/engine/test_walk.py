"""A walk that samples all nodes at once has the tokens and draws of a walk level by level."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from tests.launches import Launches
from vllm_ctc_spec.engine import walk as walk_module
from vllm_ctc_spec.engine.host_tree import HostTree
from vllm_ctc_spec.engine.walk import TreeWalker

VOCAB = 12


def walker(at_once: bool, use_fp64_gumbel: bool = False) -> TreeWalker:
    vllms = Sampler(use_fp64_gumbel=use_fp64_gumbel)
    # On a CPU vLLM's default draws otherwise.
    vllms.topk_topp_sampler.forward = vllms.topk_topp_sampler.forward_native
    return TreeWalker(vllms, at_once)


def never(*args: Any) -> Any:
    raise AssertionError


def random_tree(draw: random.Random, most_nodes: int) -> HostTree:
    tokens, parents, depths = [], [], []
    taken = set()
    for _ in range(draw.randint(0, most_nodes)):
        # Often the last node, so that trees are deep.
        parent = draw.choice([len(tokens), draw.randint(0, len(tokens))])
        token = draw.randrange(VOCAB)
        if (parent, token) not in taken:
            taken.add((parent, token))
            depths.append(1 + (depths[parent - 1] if parent else 0))
            tokens.append(token)
            parents.append(parent)
    return HostTree(tokens, parents, depths, [0.5] * len(tokens))


def logits_of(trees: Sequence[HostTree], seed: int, device: str = "cpu") -> Tensor:
    """[sum of N + 1, VOCAB]; drafted tokens are likely."""
    rows = []
    for tree in trees:
        own = torch.randn(1 + len(tree.tokens), VOCAB, generator=torch.Generator().manual_seed(seed))
        for token, parent in zip(tree.tokens, tree.parents):
            own[parent, token] += 3
        rows.append(own)
    return torch.cat(rows).to(device)


def metadata_of(
    temperatures: list[float], seeds: list[int | None], top_k: Any = None, top_p: Any = None, device: str = "cpu"
) -> SamplingMetadata:
    """top_k, top_p: None or one for each request."""
    unused = torch.empty(0)
    generators = {
        index: torch.Generator(device).manual_seed(seed) for index, seed in enumerate(seeds) if seed is not None
    }
    return SamplingMetadata(
        temperature=torch.tensor(temperatures, device=device),
        all_greedy=False,
        all_random=all(temperatures),
        top_p=None if top_p is None else torch.tensor(top_p, device=device),
        top_k=None if top_k is None else torch.tensor(top_k, dtype=torch.int32, device=device),
        generators=generators,
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=unused,
        presence_penalties=unused,
        repetition_penalties=unused,
        output_token_ids=[[] for _ in temperatures],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


@pytest.mark.parametrize("use_fp64_gumbel", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_a_walk_at_once_has_the_tokens_and_draws_of_a_walk_by_levels(
    seed: int, use_fp64_gumbel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 5)
    trees = [HostTree.chain([0]), *(random_tree(draw, 20) for _ in range(count - 1))]
    is_discarded = [draw.random() < 0.2 for _ in trees]
    temperatures = [draw.choice([0.0, 0.7, 1.3]) for _ in range(count - 1)] + [1.0]
    top_k = [draw.choice([3, VOCAB]) for _ in trees] if draw.random() < 0.5 else None
    top_p = [draw.choice([0.8, 1.0]) for _ in trees] if draw.random() < 0.5 else None
    # One run takes one request, a few or all.
    monkeypatch.setattr(walk_module, "MOST_LOGITS", VOCAB * draw.choice([1, 15, 1000]))
    walked, states = [], []
    for at_once in (False, True):
        # As in vLLM, a greedy request has no generator.
        seeds = [index if temperature else None for index, temperature in enumerate(temperatures)]
        metadata = metadata_of(temperatures, seeds, top_k, top_p)
        walk = walker(at_once, use_fp64_gumbel)
        monkeypatch.setattr(walk, "_walk_sampled" if at_once else "_walk_at_once", never)
        output = walk(logits_of(trees, seed), trees, metadata, metadata.output_token_ids, is_discarded)
        walked.append((output.sampler_output.sampled_token_ids.tolist(), output.accepted_nodes))
        states.append([generator.get_state() for generator in metadata.generators.values()])
    assert walked[0] == walked[1]
    assert all(map(torch.equal, *states))


CHOICES = HostTree([3, 5, 7, 7], [0, 0, 1, 2], [1, 1, 2, 2], [0.5] * 4)


def test_samples_without_a_seed_follow_the_target() -> None:
    count = 20_000
    logits = torch.zeros(5, VOCAB)
    # Rows of the anchor, of the nodes with tokens 3 and 5, and of their children.
    for row, likely in enumerate(([3, 5], [7, 1], [7, 2], [4], [6])):
        logits[row, likely] = torch.tensor([3.0, 2.5])[: len(likely)]
    metadata = metadata_of([0.8] * count, [None] * count)
    torch.manual_seed(0)
    output = walker(True)(
        logits.repeat(count, 1), [CHOICES] * count, metadata, metadata.output_token_ids, [False] * count
    )
    sampled = output.sampler_output.sampled_token_ids
    first, second = (logits.double() / 0.8).softmax(-1)[0], (logits.double() / 0.8).softmax(-1)[[1, 2]]
    expected = {(token, -1): float(first[token]) for token in range(VOCAB)}
    for token, row in zip((3, 5), second):
        del expected[token, -1]
        expected |= {(token, following): float(first[token] * row[following]) for following in range(VOCAB)}
    counts = Counter(map(tuple, sampled[:, :2].tolist()))
    assert set(counts) <= set(expected)
    observed = [counts[path] for path in expected]
    assert chisquare(observed, [each * count for each in expected.values()]).pvalue > 1e-4


class OneRowForEachRequest:
    """A user's processor that does not change the argmax."""

    def __init__(self, num_requests: int) -> None:
        self.num_requests = num_requests

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        assert len(logits) == self.num_requests
        return logits.masked_fill_(logits < logits.amax(1, keepdim=True), float("-inf"))


@pytest.mark.parametrize("asked", ["logprobs", "penalties", "processor", "allowed tokens", "bad words"])
def test_parameters_that_need_the_path_or_the_batch_are_walked_by_levels(asked: str) -> None:
    trees = [CHOICES, CHOICES]
    metadata = metadata_of([1.0, 1.0], [0, 1])
    if asked == "logprobs":
        metadata.max_num_logprobs = 0
    elif asked == "penalties":
        metadata.no_penalties = False
        metadata.prompt_token_ids = torch.full((2, 1), VOCAB)
        metadata.presence_penalties = torch.full((2,), 100.0)
        metadata.frequency_penalties, metadata.repetition_penalties = torch.zeros(2), torch.ones(2)
    elif asked == "processor":
        metadata.logitsprocs = LogitsProcessors([OneRowForEachRequest(2)])
    elif asked == "allowed tokens":
        metadata.allowed_token_ids_mask = torch.ones(2, VOCAB, dtype=torch.bool)
        metadata.allowed_token_ids_mask[:, 3] = False
    else:
        metadata.bad_words_token_ids = {0: [[7]], 1: [[7]]}
    logits = logits_of(trees, 0)
    output = walker(True)(logits, trees, metadata, metadata.output_token_ids, [False, False])
    tokens = output.sampler_output.sampled_token_ids.tolist()
    if asked == "logprobs":
        assert output.sampler_output.logprobs_tensors is not None
    elif asked == "penalties":
        assert all(len(set(path)) == len(path) for path in tokens)
    elif asked == "processor":
        greedy = dataclasses.replace(metadata_of([0.0, 0.0], [None, None]), all_greedy=True, all_random=False)
        best = walker(True)(logits, trees, greedy, greedy.output_token_ids, [False, False])
        assert tokens == best.sampler_output.sampled_token_ids.tolist()
    elif asked == "allowed tokens":
        assert tokens == [[3, 3], [3, 3]]
    else:
        assert all(7 not in path for path in tokens)


def test_a_deeper_tree_takes_no_more_launches() -> None:
    counts = []
    for depth in (2, 10):
        chain = HostTree.chain(list(range(depth)))
        logits = logits_of([chain], 0)
        metadata = metadata_of([1.0], [None], top_k=[5])
        with Launches() as launches:
            walker(True)(logits, [chain], metadata, metadata.output_token_ids, [False])
        counts.append(len(launches.names))
    assert 0 < counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_walk_waits_for_the_gpu_once() -> None:
    trees = [HostTree.chain(list(range(depth))) for depth in (3, 8)]
    logits = logits_of(trees, 0, "cuda")
    metadata = metadata_of([1.0, 0.7], [1, None], top_k=[5, VOCAB], device="cuda")
    walk = walker(True)
    walk(logits.clone(), trees, metadata, metadata.output_token_ids, [False, False])
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            walk(logits, trees, metadata, metadata.output_token_ids, [False, False])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]
