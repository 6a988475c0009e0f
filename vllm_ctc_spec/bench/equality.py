"""Compares a method's answers with plain vLLM's: equal, different from a near-tie on, or different.

At a near-tie the logits of two tokens are so close in a 16-bit type that rounding decides between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_ctc_spec.bench.records import Branching, Gap

Tokens = tuple[int, ...]

NEAR_TIE_STEPS = 2
"""Largest gap of a near-tie, in steps of the number type: each of the two logits may be wrong by one step."""


@dataclass(frozen=True)
class Difference:
    prompt: int
    """Index of the prompt in the cell."""
    position: int
    """Index of the first token that differs, from 0."""
    gap: float | None
    """The target's best logit minus the lower one of the two tokens; log probabilities have the same gap.
    None if a token is not among the most likely ones, if one answer ends there, or for sampled answers."""
    steps: float | None
    """`gap` in steps of the target's number type at the best logit; see `logit_step`."""
    is_near_tie: bool


@dataclass(frozen=True)
class Equality:
    """Numbers of prompts, each counted by its worst answer in all rounds."""

    equal: int
    near_tie: int
    different: int
    exact: bool | None
    """Whether `different` is 0; None if the method does not promise equal answers."""
    differences: tuple[Difference, ...]
    """One for each distinct answer that is not plain vLLM's."""


def logit_step(top_logit: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of `dtype` at `top_logit`: 0.125 in bfloat16 from 16 to 32, 0.25 from 32 on."""
    _, exponent = math.frexp(top_logit)
    return math.ldexp(torch.finfo(dtype).eps, exponent - 1)


def is_near_tie(gap: float, top_logit: float, dtype: torch.dtype) -> bool:
    """Whether rounding may decide between tokens whose logits are `gap` apart; always false in float32.

    top_logit: the best token's logit, before log-softmax.
    """
    return torch.finfo(dtype).bits == 16 and gap <= NEAR_TIE_STEPS * logit_step(top_logit, dtype)


def gap_between(logits: Mapping[int, float], plain_token: int, other_token: int) -> Gap | None:
    """The gap of the two tokens; None if one is not in `logits`, which holds the most likely tokens."""
    if plain_token not in logits or other_token not in logits:
        return None
    best = max(logits.values())
    return Gap(best - min(logits[plain_token], logits[other_token]), best)


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or at which one answer ends; None if they are equal."""
    for position, (plain_token, other_token) in enumerate(zip(plain, other)):
        if plain_token != other_token:
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
    """Compare a method's answers with plain vLLM's.

    plain[p]: plain vLLM's answer to prompt p, token ids. rounds[r][p]: the method's in round r. dtype: the target's.
    ask_gaps: asks plain vLLM for the gaps of branchings; None for sampled text. is_promised: whether the method
    promises equal answers.
    """
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
