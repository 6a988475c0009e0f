"""Passes whose results can be computed by hand."""

from __future__ import annotations

from vllm_ctc_spec.bench.equality import Difference, Equality
from vllm_ctc_spec.bench.records import Drafts, Pass, Request

EXACT = Equality(2, 0, 0, True, ())
BROKEN = Equality(1, 0, 1, False, (Difference(1, 4, 2.5, 20.0, False),))


def request(num_tokens: int, num_steps: int, total_time: float, drafts: Drafts | None = None) -> Request:
    return Request(tuple(range(num_tokens)), num_steps, total_time, 0.01, total_time - 0.01, drafts)


def plain_pass(seconds: float = 2.0) -> Pass:
    return Pass(seconds, (request(11, 11, 1.0), request(21, 21, 1.0)))


def tree_pass(seconds: float = 1.0) -> Pass:
    """First prompt: 5 steps after the prefill, 4 with drafts of 8 nodes, which accept 0, 1, 2 and 2 tokens."""
    return Pass(
        seconds,
        (request(11, 6, 0.25, Drafts((1, 1, 2, 0), 32)), request(21, 6, 0.25, Drafts((0, 0, 2, 3), 40))),
    )
