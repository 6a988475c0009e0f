"""Output of a verification: a table by group, the differences, a conclusion, and the JSON."""

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
"""Most differences that the terminal shows; the JSON has all."""

MAX_MESSAGE = 200
"""Most characters of one of vLLM's messages that the terminal shows."""


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
    """Below the table: refused and failed groups, differences, and the conclusion."""
    below = [
        f"{group.name}: {what}: {shorten(message, MAX_MESSAGE)}"
        for group in verification.groups
        for what, message in (("refused by vLLM", group.refusal), ("failed", group.failure))
        if message is not None
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
    sentences = [f"{facts.method} in {facts.dtype}: {equal} of {total} requests have the same answer as plain vLLM."]
    if facts.dtype == "float32":
        largest = max((group.largest_logprob_difference or 0.0 for group in groups), default=0.0)
        rule = f"In float32 no token may differ, and log probabilities may by {LOGPROB_TOLERANCE:g}"
        sentences.append(f"{rule}; their largest difference is {largest:.1g}.")
    elif tied or different:
        sentences.append(
            f"{tied} first differ at a near-tie: the two tokens' logits are at most {NEAR_TIE_STEPS} steps of "
            f"{facts.dtype} apart, and batches of other sizes round differently, with speculation or without. "
            "Run verify in float32 (the default) to exclude rounding."
        )
    if unpromised:
        reason = (
            f"in {facts.dtype} rounding can change a draw, and no rule tells such a draw from a wrong one"
            if verification.is_ours
            else "vLLM's own methods draw other random numbers from the same seed than plain sampling does"
        )
        sentences.append(f"{unpromised} sampled requests differ and are not counted: {reason}.")
    if verification.acceptance_length is None or verification.acceptance_length <= 1:
        sentences.append("No draft was accepted in the whole run, so it proves little. Try other prompts.")
    else:
        sentences.append(f"Acceptance length over the run: {verification.acceptance_length:.2f}.")
    if different:
        sentences.append(f"NOT EXACT: {different} requests have another answer where it must be equal.")
    elif not verification.holds:
        sentences.append("NOT SUPPORTED: some requests that plain vLLM answers were refused, or the engine failed.")
    elif facts.dtype == "float32":
        sentences.append("Exact: nothing differs that must be equal.")
    else:
        sentences.append(f"As exact as {facts.dtype} allows: nothing differs but at near-ties.")
    return sentences


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
