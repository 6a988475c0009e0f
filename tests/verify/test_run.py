"""A whole verification, with fake engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_ctc_spec.bench.processes import MethodFailed
from vllm_ctc_spec.bench.records import Answer, Ask, EngineFacts
from vllm_ctc_spec.verify import run as run_module
from vllm_ctc_spec.verify.groups import NUM_GROUPS
from vllm_ctc_spec.verify.judge import GroupResult
from vllm_ctc_spec.verify.run import MAX_FAILURES, Task, Verification, verify

Act = Callable[[Ask, Answer], Answer]
"""Takes a request and its right answer; returns the answer of the engine with speculation, or raises."""


class FakeProcess:
    started: list[str]
    method: str
    act: Act

    def __init__(self, log: Path) -> None:
        self.is_plain = log.name.startswith("plain")
        type(self).started.append(log.name)

    def call(self, command: str, **arguments: Any) -> Any:
        if command == "start":
            assert ("speculative_config" in arguments["options"]) != self.is_plain
            return EngineFacts("float32", 64, False, None if self.is_plain else type(self).method)
        if command == "acceptance_length":
            return 2.5
        try:
            return [self._answer(ask, arguments["logits_mode"]) for ask in arguments["asks"]]
        except ValueError as error:
            return str(error)

    def _answer(self, ask: Ask, logits_mode: str | None) -> Answer:
        tokens = tuple(range(5, 5 + ask.params["max_tokens"]))
        logprobs = tuple({token: -0.5} for token in tokens) if "logprobs" in ask.params and not logits_mode else ()
        logits = tuple({token: 20.0, 1: 19.0} for token in tokens) if logits_mode else ()
        right = Answer(tokens, "some text", "length", None, logprobs, logits)
        return right if self.is_plain else type(self).act(ask, right)

    def close(self) -> None:
        pass


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Verification]:
    def check(act: Act = lambda ask, answer: answer, method: str = "ctc") -> Verification:
        FakeProcess.started, FakeProcess.method, FakeProcess.act = [], method, staticmethod(act)
        monkeypatch.setattr(run_module, "MethodProcess", FakeProcess)
        done: list[int] = []
        prompts = tuple((index,) for index in range(6))
        task = Task("target", {"method": method}, {}, prompts, 16)
        found = verify(task, tmp_path, lambda title, stage, count: done.append(count))
        assert sum(done) == 2 * NUM_GROUPS == 2 * len(found.groups)
        return found

    return check


def named(found: Verification) -> dict[str, GroupResult]:
    return {group.name: group for group in found.groups}


def test_an_exact_method_holds(verified: Callable[..., Verification]):
    found = verified()
    assert found.holds and found.is_ours and found.acceptance_length == 2.5
    assert all(group.equal == group.num_requests for group in found.groups)
    assert FakeProcess.started == ["plain-1.log", "speculative-1.log"]


def test_one_wrong_token_of_one_request_is_found(verified: Callable[..., Verification]):
    def act(ask: Ask, answer: Answer) -> Answer:
        if ask.prompt == (3,) and ask.params["max_tokens"] == 4:
            return Answer((5, 6, 1, 8), answer.text, answer.finish_reason, None)
        return answer

    found = verified(act)
    assert not found.holds
    [finding] = named(found)["max_tokens 1 to 13"].findings
    assert (finding.request, finding.position, finding.gap) == (3, 2, 1.0)
    assert sum(group.different for group in found.groups) == 1


def test_seeded_answers_bind_our_method_and_not_vllms_own(verified: Callable[..., Verification]):
    def act(ask: Ask, answer: Answer) -> Answer:
        return answer if ask.is_greedy else Answer((9, 9), "other", "stop", None)

    assert not verified(act).holds
    found = verified(act, "ngram")
    assert found.holds and named(found)["t=1, top-k"].not_promised == 6


def test_refused_parameters_are_told(verified: Callable[..., Verification]):
    def act(ask: Ask, answer: Answer) -> Answer:
        if "min_p" in ask.params:
            raise ValueError("min_p is not supported")
        return answer

    found = verified(act, "ngram")
    assert found.holds and named(found)["t=1, min-p"].refusal == "min_p is not supported"
    assert not verified(act, "ctc").holds


def test_an_engine_that_fails_is_started_again(verified: Callable[..., Verification]):
    def act(ask: Ask, answer: Answer) -> Answer:
        if "stop" in ask.params:
            raise MethodFailed("RuntimeError: empty")
        return answer

    found = verified(act)
    assert not found.holds and named(found)["stop strings"].failure == "RuntimeError: empty"
    assert sum(group.equal for group in found.groups) == sum(group.num_requests for group in found.groups) - 6
    assert FakeProcess.started == ["plain-1.log", "speculative-1.log", "speculative-2.log"]


def test_one_that_fails_always_is_given_up(verified: Callable[..., Verification]):
    def act(ask: Ask, answer: Answer) -> Answer:
        raise MethodFailed("RuntimeError: empty")

    found = verified(act)
    assert len(FakeProcess.started) == 1 + MAX_FAILURES
    assert "not asked" in str(found.groups[-1].failure)
