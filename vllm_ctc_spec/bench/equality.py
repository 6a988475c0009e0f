"""Whether a method's answers are plain vLLM's: equal, different at a near-tie only, or different.

A near-tie: in a 16-bit type the logits of two tokens lie so close together that rounding decides between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_ctc_spec.bench.records import Branching, Gap

Tokens = tuple[int, ...]

NEAR_TIE_STEPS = 2
"""Each of the two logits may have been rounded the other way."""


@dataclass(frozen=True)
class Difference:
    prompt: int
    """Index in the cell."""
    position: int
    """First token of the answer that differs, from 0."""
    gap: float | None
    """How far the worse of the two tokens' logits lies below the target's best; log probabilities have the same gap.
    None: beyond the most likely tokens, or one answer ends where the other goes on, or sampled."""
    steps: float | None
    """The same in steps of the target's type at the best logit; see `logit_step`."""
    is_near_tie: bool


@dataclass(frozen=True)
class Equality:
    """Counts of prompts, each by the worst of its answers over all rounds."""

    equal: int
    near_tie: int
    different: int
    exact: bool | None
    """Nothing differs beyond a near-tie; None where the method does not promise it."""
    differences: tuple[Difference, ...]
    """One for each answer that is not plain vLLM's, repeated answers left out."""


def logit_step(top_logit: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of `dtype` at `top_logit`: 0.125 in bfloat16 from 16 to 32, 0.25 from 32 on."""
    _, exponent = math.frexp(top_logit)
    return math.ldexp(torch.finfo(dtype).eps, exponent - 1)


def is_near_tie(gap: float, top_logit: float, dtype: torch.dtype) -> bool:
    """Whether rounding may decide between tokens whose logits lie `gap` apart; never in float32.

    top_logit: the best token's, before log-softmax.
    """
    return torch.finfo(dtype).bits == 16 and gap <= NEAR_TIE_STEPS * logit_step(top_logit, dtype)


def gap_between(logits: Mapping[int, float], plain_token: int, other_token: int) -> Gap | None:
    """logits: those of the most likely tokens; None where one of the two is not among them."""
    if plain_token not in logits or other_token not in logits:
        return None
    best = max(logits.values())
    return Gap(best - min(logits[plain_token], logits[other_token]), best)


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    for position, (ours, theirs) in enumerate(zip(plain, other)):
        if ours != theirs:
            return position
    return None if len(plain) == len(other) else min(len(plain), len(other))


def judge(
    prompts: Sequence[Tokens],
    plain: Sequence[Tokens],
    rounds: Sequence[Sequence[Tokens]],
    dtype: torch.dtype,
    ask_gaps: Callable[[Sequence[Branching]], list[Gap | None]] | None,
    is_promised: bool,
) -> Equality:
    """rounds[r][p] is the answer of round r to prompt p; `ask_gaps` asks the plain target, None for sampled text."""
    found = [
        (index, position, answer)
        for index, reference in enumerate(plain)
        for answer in sorted({answers[index] for answers in rounds})
        if (position := first_difference(reference, answer)) is not None
    ]
    branching = {
        number: Branching((*prompts[index], *answer[:position]), plain[index][position], answer[position])
        for number, (index, position, answer) in enumerate(found)
        if position < min(len(plain[index]), len(answer))
    }
    gaps: dict[int, Gap | None] = {}
    if branching and ask_gaps is not None:
        gaps = dict(zip(branching, ask_gaps(list(branching.values())), strict=True))
    differences = [
        difference(index, position, gaps.get(number), dtype) for number, (index, position, _) in enumerate(found)
    ]
    different = {each.prompt for each in differences if not each.is_near_tie}
    num_tied = len({each.prompt for each in differences} - different)
    return Equality(
        equal=len(prompts) - len(different) - num_tied,
        near_tie=num_tied,
        different=len(different),
        exact=not different if is_promised else None,
        differences=tuple(differences),
    )


def difference(prompt: int, position: int, gap: Gap | None, dtype: torch.dtype) -> Difference:
    if gap is None:
        return Difference(prompt, position, None, None, False)
    steps = gap.logits / logit_step(gap.top_logit, dtype)
    return Difference(prompt, position, gap.logits, steps, is_near_tie(gap.logits, gap.top_logit, dtype))
