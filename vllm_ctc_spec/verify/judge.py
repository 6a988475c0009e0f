"""Compares answers with and without speculation: equal, different at a near-tie, different, not promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from vllm_ctc_spec.bench.equality import difference, first_difference, gap_between
from vllm_ctc_spec.bench.records import Answer
from vllm_ctc_spec.verify.groups import Group

LOGPROB_TOLERANCE = 1e-4
"""Nats by which log probabilities may differ in float32."""


class Kind(StrEnum):
    NEAR_TIE = "near-tie"
    DIFFERENT = "different"
    NOT_PROMISED = "not promised"


@dataclass(frozen=True)
class Finding:
    """A request whose two answers differ."""

    request: int
    """Index in its group."""
    kind: Kind
    what: str
    """The difference, in words."""
    position: int | None
    """Index of the first token that differs; None if all tokens are equal."""
    gap: float | None
    """Of the two tokens' logits there, see `equality.Difference`; None for sampled requests."""
    steps: float | None
    """The gap in steps of the engines' number type, see `equality.logit_step`."""


@dataclass(frozen=True)
class GroupResult:
    name: str
    num_requests: int
    equal: int
    near_tie: int
    different: int
    not_promised: int
    """Sampled requests that differ, of a method or number type that does not promise them."""
    findings: tuple[Finding, ...] = ()
    largest_gap: float | None = None
    largest_steps: float | None = None
    largest_logprob_difference: float | None = None
    refusal: str | None = None
    """vLLM's message if the method does not support these parameters; nothing is compared then."""
    failure: str | None = None
    """Cause, if the engine failed; nothing is compared then."""

    @classmethod
    def refused(cls, group: Group, refusal: str) -> GroupResult:
        return cls(group.name, len(group.asks), 0, 0, 0, 0, refusal=refusal)

    @classmethod
    def failed(cls, group: Group, failure: str) -> GroupResult:
        return cls(group.name, len(group.asks), 0, 0, 0, 0, failure=failure)

    @property
    def is_answered(self) -> bool:
        return self.refusal is None and self.failure is None


def judge_group(
    group: Group, plain: Sequence[Answer], other: Sequence[Answer], dtype: torch.dtype, promises_sampled: bool
) -> GroupResult:
    """plain: greedy answers have logits, and log probabilities if the group asks for them. dtype: the engines'.

    promises_sampled: whether seeded requests must have equal answers, too.
    """
    findings = []
    for index, (ask, ours, theirs) in enumerate(zip(group.asks, plain, other, strict=True)):
        is_promised = ask.is_greedy or promises_sampled
        if (found := _compare(index, ours, theirs, dtype, is_promised)) is not None:
            findings.append(found)
    counts = {kind: sum(found.kind is kind for found in findings) for kind in Kind}
    logprob_differences = [largest for each in zip(plain, other) if (largest := logprob_difference(*each)) is not None]
    return GroupResult(
        name=group.name,
        num_requests=len(group.asks),
        equal=len(group.asks) - len(findings),
        near_tie=counts[Kind.NEAR_TIE],
        different=counts[Kind.DIFFERENT],
        not_promised=counts[Kind.NOT_PROMISED],
        findings=tuple(findings),
        largest_gap=max((found.gap for found in findings if found.gap is not None), default=None),
        largest_steps=max((found.steps for found in findings if found.steps is not None), default=None),
        largest_logprob_difference=max(logprob_differences, default=None),
    )


def _compare(index: int, plain: Answer, other: Answer, dtype: torch.dtype, is_promised: bool) -> Finding | None:
    failed = Kind.DIFFERENT if is_promised else Kind.NOT_PROMISED
    position = first_difference(plain.token_ids, other.token_ids)
    if position is None:
        what = _difference_beside_tokens(plain, other, dtype)
        return None if what is None else Finding(index, failed, what, None, None, None)
    if position == min(len(plain.token_ids), len(other.token_ids)):
        what = f"{len(other.token_ids)} tokens, not {len(plain.token_ids)}"
        return Finding(index, failed, what, position, None, None)
    tokens = plain.token_ids[position], other.token_ids[position]
    gap = gap_between(plain.logits[position], *tokens) if plain.logits and is_promised else None
    place = difference(index, position, gap, dtype)
    what = f"token {position} is {tokens[1]}, not {tokens[0]}"
    return Finding(index, Kind.NEAR_TIE if place.is_near_tie else failed, what, position, place.gap, place.steps)


def _difference_beside_tokens(plain: Answer, other: Answer, dtype: torch.dtype) -> str | None:
    """Of two answers with equal tokens: text, reasons to stop, log probabilities."""
    for name in ("text", "finish_reason", "stop_reason"):
        expected, found = getattr(plain, name), getattr(other, name)
        if expected != found:
            return f"{name} is {found!r}, not {expected!r}"
    if len(plain.logprobs) != len(other.logprobs):
        return f"log probabilities of {len(other.logprobs)} tokens, not {len(plain.logprobs)}"
    largest = logprob_difference(plain, other)
    if largest is not None and largest > LOGPROB_TOLERANCE and dtype == torch.float32:
        return f"log probabilities differ by {largest:.1g}"
    return None


def logprob_difference(plain: Answer, other: Answer) -> float | None:
    """The largest, in nats, over the tokens before the first that differs; None without log probabilities."""
    differences: list[float] = []
    for ours, theirs, token, other_token in zip(plain.logprobs, other.logprobs, plain.token_ids, other.token_ids):
        if token != other_token:
            break
        differences.append(abs(ours[token] - theirs[token]))
        # By rank, not by token: rounding may swap two tokens of equal probability.
        ranks = zip(sorted(ours.values(), reverse=True), sorted(theirs.values(), reverse=True))
        differences += [abs(mine - reference) for mine, reference in ranks]
    return max(differences, default=None)
