"""Whether a method says what plain vLLM says: the same tokens, or apart at a near-tie, or different."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_ctc_spec.bench.records import Branching

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    prompt: int
    """Index in the cell."""
    position: int
    """First token of the answer that differs, from 0."""
    gap: float | None
    """Nats that the worse of the two tokens lies below the target's best; None: beyond the most likely, or one answer
    ends where the other goes on, or sampled."""


@dataclass(frozen=True)
class Equality:
    """Counts of prompts, each by the worst of its answers over all rounds."""

    identical: int
    near_tie: int
    different: int
    exact: bool | None
    """Nothing differs beyond a near-tie; None where the method does not promise it."""
    differences: tuple[Difference, ...]
    """Those that are no near-ties, or all where nothing is promised."""


def first_difference(plain: Tokens, other: Tokens) -> int | None:
    for position, (ours, theirs) in enumerate(zip(plain, other)):
        if ours != theirs:
            return position
    return None if len(plain) == len(other) else min(len(plain), len(other))


def judge(
    prompts: Sequence[Tokens],
    plain: Sequence[Tokens],
    rounds: Sequence[Sequence[Tokens]],
    near_tie_nats: float | None,
    ask_gaps: Callable[[Sequence[Branching]], list[float | None]],
    is_promised: bool,
) -> Equality:
    """rounds[r][p] is the answer of round r to prompt p; `ask_gaps` asks the plain target.

    near_tie_nats: the largest gap that excuses a difference; None where no gap does (float32, or sampled text).
    """
    found = [
        (index, position, answer)
        for index, reference in enumerate(plain)
        for answer in sorted({answers[index] for answers in rounds})
        if (position := first_difference(reference, answer)) is not None
    ]
    gaps: dict[int, float | None] = {}
    if near_tie_nats is not None:
        branching = {
            number: Branching(
                (*prompts[index], *answer[:position]), plain[index][position], answer[position]
            )
            for number, (index, position, answer) in enumerate(found)
            if position < min(len(plain[index]), len(answer))
        }  # fmt: skip
        if branching:
            gaps = dict(zip(branching, ask_gaps(list(branching.values())), strict=True))
    differences, tied = [], set()
    for number, (index, position, _) in enumerate(found):
        gap = gaps.get(number)
        if near_tie_nats is not None and gap is not None and gap < near_tie_nats:
            tied.add(index)
        else:
            differences.append(Difference(index, position, gap))
    different = {each.prompt for each in differences}
    num_tied = len(tied - different)
    return Equality(
        identical=len(prompts) - len(different) - num_tied,
        near_tie=num_tied,
        different=len(different),
        exact=not different if is_promised else None,
        differences=tuple(differences),
    )
