"""One cell of a run (prompts, batch size, sampling): measured in rounds and summarised by method."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from vllm_ctc_spec.bench.config import PLAIN, BenchConfig, Method
from vllm_ctc_spec.bench.equality import Equality, judge
from vllm_ctc_spec.bench.processes import Fleet
from vllm_ctc_spec.bench.records import Pass, Request, Sampling, Workload

T = TypeVar("T")

Report = Callable[[str, int], None]
"""Called with the current activity, and the number of passes that have ended since the last call."""


@dataclass(frozen=True)
class Cell:
    prompts: str
    batch_size: int
    sampling: Sampling

    @property
    def file_name(self) -> str:
        return f"{self.prompts}-batch{self.batch_size}-{self.sampling.file_part}.json"

    def __str__(self) -> str:
        return f"{self.prompts}, batch {self.batch_size}, {self.sampling}"


@dataclass(frozen=True)
class Prompt:
    name: str
    """Name of the question, with the number of the turn if it has several."""
    category: str
    token_ids: tuple[int, ...]


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, evenly spaced, so that every category has its share."""
    return [items[index * len(items) // count] for index in range(count)]


def workload(
    config: BenchConfig, context: int, prompts: Sequence[Prompt], batch_size: int, sampling: Sampling
) -> Workload:
    """One pass over `prompts`; context: most tokens of a prompt and its answer together."""
    return Workload(
        prompts=tuple(prompt.token_ids for prompt in prompts),
        max_tokens=tuple(min(config.max_tokens, context - len(prompt.token_ids)) for prompt in prompts),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=config.seed,
        batch_size=batch_size,
        ignore_eos=config.ignore_eos,
    )


class Measurement:
    """Measures one cell: all methods, in rounds."""

    def __init__(
        self, config: BenchConfig, context: int, cell: Cell, prompts: list[Prompt], fleet: Fleet, report: Report
    ) -> None:
        self.config, self.cell, self.prompts, self.fleet, self.report = config, cell, prompts, fleet, report
        self.work = {"workload": workload(config, context, self.prompts, cell.batch_size, cell.sampling)}
        self.passes: dict[str, list[Pass]] = {}
        """By method, in order; the first pass is the warm-up."""

    def measure(self) -> dict[str, Any]:
        """The cell's results, as JSON values."""
        load = os.getloadavg()[0]
        for method in self.fleet.alive:
            self.fleet.call(method.name, "reset_memory")
        # Methods take turns within a round, so that a slow minute of the machine affects all of them.
        for number in range(1 + self.config.rounds):
            for method in self.fleet.alive:
                self._pass(method, f"round {number} of {self.config.rounds}" if number else "warm-up")
        memory = {method.name: self.fleet.call(method.name, "peak_memory") for method in self.fleet.alive}
        methods = {method.name: self._result(method, memory[method.name]) for method in self.fleet.alive}
        return {
            **dataclasses.asdict(self.cell),
            "prompt_names": [prompt.name for prompt in self.prompts],
            "load_average": load,
            "methods": methods,
            "errors": self.fleet.errors,
        }

    def _pass(self, method: Method, title: str) -> None:
        self.report(f"{self.cell}: {method.name}, {title}", 0)
        done = self.fleet.call(method.name, "run", **self.work)
        if done is not None:
            self.passes.setdefault(method.name, []).append(done)
        self.report(f"{self.cell}: {method.name}, {title}", 1)

    def _result(self, method: Method, peak_memory: int) -> dict[str, Any]:
        stages = None
        if method.is_ctc:
            self.report(f"{self.cell}: {method.name}, stages", 0)
            stages = self.fleet.stage_times(method.name, self.work)
            self.report(f"{self.cell}: {method.name}, stages", 1)
        plain, passes = self.passes[PLAIN], self.passes[method.name]
        categories = [prompt.category for prompt in self.prompts]
        result = summarize(categories, plain[1:], passes[1:], self._equality(method), peak_memory, stages)
        return dataclasses.asdict(result) | {"engine": dataclasses.asdict(self.fleet.facts[method.name])}

    def _equality(self, method: Method) -> Equality:
        is_greedy = self.cell.sampling.is_greedy
        dtype: torch.dtype = getattr(torch, self.fleet.facts[PLAIN].dtype)
        answers = {
            name: [[request.token_ids for request in each.requests] for each in self.passes[name]]
            for name in (PLAIN, method.name)
        }
        return judge(
            self.work["workload"].prompts,
            answers[PLAIN][0],
            answers[method.name],
            dtype,
            (lambda branchings: self.fleet.call(PLAIN, "gaps", branchings=branchings)) if is_greedy else None,
            # vLLM's rejection sampler draws other random numbers than plain sampling. In 16 bits rounding can change a
            # draw, and no rule tells such a draw from a wrong one.
            is_promised=is_greedy or (dtype == torch.float32 and (method.is_ctc or method.speculative_config is None)),
        )


@dataclass(frozen=True)
class CategoryResult:
    """Results of one category, or of all prompts."""

    num_prompts: int
    beta: float
    """Tokens per decoding step, without the prefill and its token (arXiv 2412.00061, equation 12)."""
    gamma: float
    """Mean time per token, plain vLLM's / the method's (equation 13)."""


@dataclass(frozen=True)
class MethodResult:
    """Times in milliseconds, memory in bytes."""

    tokens_per_second: tuple[float, ...]
    """Per round."""
    ratios: tuple[float, ...]
    """Per round, tokens/s over plain vLLM's in the same round."""
    ratio: Ratio
    overall: CategoryResult
    categories: dict[str, CategoryResult]
    acceptance_length: float | None
    """vLLM's definition: 1 + accepted tokens / steps with a draft. None if nothing was drafted."""
    acceptance_by_depth: tuple[float, ...]
    """Share of accepted drafts at depth 1, 2, ..., among those accepted at the depth above."""
    nodes_per_step: float | None
    """Draft tokens per step with a draft."""
    first_token_ms: float
    """Time to the first token, median over requests and rounds."""
    per_token_ms: float
    """Time per token after the first, median over requests and rounds."""
    peak_memory: int
    equality: Equality
    stages_ms: dict[str, float] | None
    """Medians over steps; None for methods other than CTC."""


def summarize(
    categories: Sequence[str],
    plain: Sequence[Pass],
    passes: Sequence[Pass],
    equality: Equality,
    peak_memory: int,
    stages_ms: dict[str, float] | None,
) -> MethodResult:
    """categories[p]: category of prompt p; plain, passes: plain vLLM's and the method's passes of the same rounds."""
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
        overall=_category(range(len(categories)), plain, passes),
        categories={name: _category(chosen, plain, passes) for name, chosen in indices.items()},
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


def _category(indices: Sequence[int], plain: Sequence[Pass], passes: Sequence[Pass]) -> CategoryResult:
    requests = [each.requests[index] for each in passes for index in indices]
    plain_requests = [each.requests[index] for each in plain for index in indices]
    return CategoryResult(len(indices), beta(requests), token_time(plain_requests) / token_time(requests))


def beta(requests: Sequence[Request]) -> float:
    """Tokens per decoding step. The prefill is none: it emits one token with any method."""
    num_steps = sum(request.num_steps - 1 for request in requests)
    return sum(len(request.token_ids) - 1 for request in requests) / num_steps if num_steps else 1.0


def token_time(requests: Sequence[Request]) -> float:
    """Seconds per generated token, prefill included."""
    return sum(request.total_time for request in requests) / sum(len(request.token_ids) for request in requests)


def _draft_counts(requests: Sequence[Request]) -> tuple[int, int, list[int]]:
    """Steps with a draft, draft tokens, and for d = 1, 2, ... steps that accepted at least d tokens."""
    drafts = [request.drafts for request in requests if request.drafts is not None]
    steps = [sum(counts) for counts in zip(*(each.steps_by_accepted for each in drafts))]
    return sum(steps), sum(each.num_nodes for each in drafts), [sum(steps[depth:]) for depth in range(1, len(steps))]


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    mean: float
    """Geometric mean over rounds."""
    low: float
    high: float
    """Ends of the confidence interval."""


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Mean and confidence interval of values / baseline; entries i of both are of the same round, all above 0.

    Needs at least two rounds. The interval is Student's t on log(values / baseline), because a disturbance of a round
    multiplies both of its values.
    """
    from scipy.stats import t

    logs = [math.log(value / base) for value, base in zip(values, baseline, strict=True)]
    mean = statistics.fmean(logs)
    margin = t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - margin), math.exp(mean + margin))
