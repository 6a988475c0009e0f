"""From the passes of a cell to the figures of each method."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_ctc_spec.bench.equality import Equality
from vllm_ctc_spec.bench.ratio import Ratio, paired_ratio
from vllm_ctc_spec.bench.records import Pass, Request


@dataclass(frozen=True)
class Share:
    """The figures of one category, or of all prompts."""

    num_prompts: int
    beta: float
    """Tokens per decoding step, the prefill and its token apart (arXiv 2412.00061, equation 12)."""
    gamma: float
    """Mean time per token of plain vLLM / of the method (equation 13)."""


@dataclass(frozen=True)
class MethodResult:
    """Times in milliseconds, memory in bytes."""

    tokens_per_second: tuple[float, ...]
    """Per round."""
    ratios: tuple[float, ...]
    """Per round, tokens/s over plain vLLM's in the same round."""
    ratio: Ratio
    overall: Share
    categories: dict[str, Share]
    acceptance_length: float | None
    """vLLM's: 1 + accepted / steps that had a draft. None where nothing was drafted."""
    acceptance_by_depth: tuple[float, ...]
    nodes_per_step: float | None
    """Draft tokens per step that had a draft."""
    first_token_ms: float
    """Median over requests and rounds."""
    per_token_ms: float
    """The same, of the tokens after the first."""
    peak_memory: int
    equality: Equality
    stages_ms: dict[str, float] | None
    """Medians over steps; None for other methods than CTC."""


def summarize(
    categories: Sequence[str],
    plain: Sequence[Pass],
    passes: Sequence[Pass],
    equality: Equality,
    peak_memory: int,
    stages_ms: dict[str, float] | None,
) -> MethodResult:
    """categories[p] of prompt p; `plain` and `passes` of the same rounds."""
    from vllm_ctc_spec.engine.metrics import TreeMetrics

    speeds = tuple(each.tokens_per_second for each in passes)
    plain_speeds = tuple(each.tokens_per_second for each in plain)
    requests = [request for each in passes for request in each.requests]
    metrics = TreeMetrics.from_counts(*_draft_counts(requests))
    indices = {name: [i for i, other in enumerate(categories) if other == name] for name in dict.fromkeys(categories)}
    decoding = [request for request in requests if len(request.token_ids) > 1]
    return MethodResult(
        tokens_per_second=speeds,
        ratios=tuple(speed / base for speed, base in zip(speeds, plain_speeds, strict=True)),
        ratio=paired_ratio(speeds, plain_speeds),
        overall=_share(range(len(categories)), plain, passes),
        categories={name: _share(chosen, plain, passes) for name, chosen in indices.items()},
        acceptance_length=metrics.acceptance_length if metrics else None,
        acceptance_by_depth=metrics.acceptance_by_depth if metrics else (),
        nodes_per_step=metrics.nodes_per_step if metrics else None,
        first_token_ms=1e3 * statistics.median(request.first_token_time for request in requests),
        per_token_ms=1e3 * _median(each.decode_time / (len(each.token_ids) - 1) for each in decoding),
        peak_memory=peak_memory,
        equality=equality,
        stages_ms=stages_ms,
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median([*values] or [0.0])


def _share(indices: Sequence[int], plain: Sequence[Pass], passes: Sequence[Pass]) -> Share:
    own = [each.requests[index] for each in passes for index in indices]
    theirs = [each.requests[index] for each in plain for index in indices]
    return Share(len(indices), beta(own), token_time(theirs) / token_time(own))


def beta(requests: Sequence[Request]) -> float:
    """The prefill emits one token whatever the method, so it is no decoding step."""
    num_steps = sum(request.num_steps - 1 for request in requests)
    return sum(len(request.token_ids) - 1 for request in requests) / num_steps if num_steps else 1.0


def token_time(requests: Sequence[Request]) -> float:
    """Seconds per generated token, prefill included."""
    return sum(request.total_time for request in requests) / sum(len(request.token_ids) for request in requests)


def _draft_counts(requests: Sequence[Request]) -> tuple[int, int, list[int]]:
    """Steps with a draft, draft tokens, and steps that accepted at least d tokens, d = 1, 2, ..."""
    drafts = [request.drafts for request in requests if request.drafts is not None]
    steps = [sum(counts) for counts in zip(*(each.steps_by_accepted for each in drafts))]
    return sum(steps), sum(each.num_nodes for each in drafts), [sum(steps[depth:]) for depth in range(1, len(steps))]
