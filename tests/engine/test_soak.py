"""The short form of benchmarks/soak.py, offline; test_serve.py runs it with a server."""

from __future__ import annotations

import os

import pytest
from vllm import LLM

from benchmarks.soak import Answer, Tally, ask_offline, left_over, make_asks, metrics_of, remembered
from tests.engine.conftest import engine
from tests.tiny_pair import TinyPair

TOUCHED_LATER = 1 << 28
"""Bytes by which an engine may grow, because pages of its cache count as memory once they are used."""


def test_a_mixed_load_is_answered_exactly_and_leaves_nothing_behind(
    pair: TinyPair, plain: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    asks, expected = make_asks(prompts, 150, 60, compare_every=5), dict[int, Answer | None]()
    ask_offline(plain, {number: ask for number, ask in asks.items() if number % 5 == 0}, 1, expected.__setitem__)
    tally = Tally(expected, os.getpid(), warm_up=50)
    with engine(pair, {}, max_num_seqs=12) as llm:
        ask_offline(llm, asks, 12, tally)
        # The worker frees ended requests in its next step.
        ask_offline(llm, {0: asks[0]}, 1, tally)
        left, [known], growth = left_over(metrics_of(llm)), llm.collective_rpc(remembered), tally.growth()
    assert tally.num_compared == 31 and tally.different == []
    assert tally.num_aborted > 10
    assert left == {} and max(known.values()) <= 1
    assert growth < TOUCHED_LATER
