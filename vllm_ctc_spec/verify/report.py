"""A verification for people: a table with the largest gap of each group, the differences, and what they mean."""

from __future__ import annotations

import dataclasses
from textwrap import shorten
from typing import Any

from rich import box
from rich.table import Table

from vllm_ctc_spec.bench.equality import NEAR_TIE_STEPS
from vllm_ctc_spec.verify.judge import LOGPROB_TOLERANCE, Kind
from vllm_ctc_spec.verify.run import Task, Verification

MAX_LISTED = 10
"""Differences that the terminal shows; the JSON has all."""

MAX_SAID = 200
"""Characters of vLLM's message that the terminal shows."""


def to_table(verification: Verification) -> Table:
    is_float32 = verification.facts.dtype == "float32"
    has_unpromised = any(group.not_promised for group in verification.groups)
    columns = ["requests", "equal", *([] if is_float32 else ["near-tie"]), "different"]
    columns += ["may\ndiffer"] if has_unpromised else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("group", no_wrap=True)
    for column in (*columns, "gap"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in verification.groups:
        if not group.is_answered:
            table.add_row(group.name, str(group.num_requests), "refused" if group.failure is None else "failed")
            continue
        counts = [group.num_requests, group.equal, *([] if is_float32 else [group.near_tie]), group.different]
        counts += [group.not_promised] if has_unpromised else []
        table.add_row(
            group.name, *map(str, counts), _gap(group.largest_gap, None if is_float32 else group.largest_steps)
        )
    return table


def lines(verification: Verification) -> list[str]:
    """What is below the table: refusals, differences, and what all of it means."""
    below = [
        f"{group.name}: {what}: {shorten(said, MAX_SAID)}"
        for group in verification.groups
        for what, said in (("refused by vLLM", group.refusal), ("failed", group.failure))
        if said is not None
    ]
    found = [
        f"{group.name}, request {each.request}: {each.what}" + (f" (gap {gap})" if gap else "")
        for group in verification.groups
        for each in group.findings
        if each.kind is Kind.DIFFERENT
        for gap in [_gap(each.gap, None if verification.facts.dtype == "float32" else each.steps)]
    ]
    below += found[:MAX_LISTED]
    if len(found) > MAX_LISTED:
        below.append(f"{len(found) - MAX_LISTED} more differences")
    return [*below, *conclusion(verification)]


def conclusion(verification: Verification) -> list[str]:
    facts, groups = verification.facts, [group for group in verification.groups if group.is_answered]
    total, equal, tied, different, unpromised = (
        sum(getattr(group, name) for group in groups)
        for name in ("num_requests", "equal", "near_tie", "different", "not_promised")
    )
    said = [f"{facts.method} in {facts.dtype}: {equal} of {total} requests are answered as without speculation."]
    if facts.dtype == "float32":
        apart = max((group.largest_logprob_difference or 0.0 for group in groups), default=0.0)
        rule = f"In float32 no token may differ, and log probabilities by {LOGPROB_TOLERANCE:g} at most"
        said.append(f"{rule}; the largest difference is {apart:.1g}.")
    elif tied or different:
        said.append(
            f"{tied} part where the two tokens' logits are at most {NEAR_TIE_STEPS} steps of {facts.dtype} apart: "
            "sums of several rows can round differently there, with speculation and without. "
            "Run this in float32 (the default) for a proof without rounding."
        )
    if unpromised:
        reason = (
            f"in {facts.dtype} a draw that rounding has flipped looks like any other"
            if verification.is_ours
            else "vLLM's own methods draw other random numbers from the same seed than plain sampling does"
        )
        said.append(f"{unpromised} sampled requests differ and count for nothing: {reason}.")
    if verification.acceptance_length is None or verification.acceptance_length <= 1:
        said.append("No draft was accepted in the whole run, so that it says little. Try other prompts.")
    else:
        said.append(f"Acceptance length over the run: {verification.acceptance_length:.2f}.")
    if different:
        said.append(f"NOT EXACT: {different} requests are answered differently where they must not be.")
    elif not verification.holds:
        said.append("NOT SUPPORTED: requests were refused, or ended the engine, that plain vLLM answers.")
    elif facts.dtype == "float32":
        said.append("Exact: nothing differs that must not.")
    else:
        said.append(f"As exact as {facts.dtype} allows: nothing differs beyond near-ties that must not.")
    return said


def as_json(task: Task, verification: Verification) -> dict[str, Any]:
    return {
        "target": task.target,
        "speculative_config": task.speculative_config,
        "engine": task.engine,
        "max_tokens": task.max_tokens,
        "num_prompts": len(task.prompts),
        **dataclasses.asdict(verification),
        "holds": verification.holds,
    }


def _gap(gap: float | None, steps: float | None) -> str:
    if gap is None:
        return ""
    return f"{gap:.3g}" if steps is None else f"{steps:.0f} step{'s' if steps != 1 else ''}"
