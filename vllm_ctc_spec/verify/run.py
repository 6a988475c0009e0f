"""Runs the requests: first on plain vLLM, then with the speculative method, one engine process at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_ctc_spec.bench.processes import MethodFailed, MethodProcess
from vllm_ctc_spec.bench.records import Answer, EngineFacts
from vllm_ctc_spec.verify.groups import Group, greedy_group, other_groups
from vllm_ctc_spec.verify.judge import GroupResult, judge_group

Prompts = tuple[tuple[int, ...], ...]
Report = Callable[[str, str, int], None]
"""Called with the engine's title, its present work, and the number of groups answered since the last call."""

PLAIN = "plain"
SPECULATIVE = "speculative"
TITLES = {PLAIN: "plain vLLM", SPECULATIVE: "with speculation"}
OUR_METHOD = "ctc"
MAX_FAILURES = 3
"""An engine that has failed so often is not started again."""


@dataclass(frozen=True)
class Task:
    target: str
    speculative_config: dict[str, Any]
    engine: dict[str, Any]
    """Keyword arguments of `vllm.LLM` for both engines."""
    prompts: Prompts
    max_tokens: int


@dataclass(frozen=True)
class Verification:
    facts: EngineFacts
    """Of the engine with the speculative method."""
    acceptance_length: float | None
    """Since the engine's last start; None where nothing was drafted."""
    groups: tuple[GroupResult, ...]

    @property
    def is_ours(self) -> bool:
        return self.facts.method == OUR_METHOD

    @property
    def holds(self) -> bool:
        """Nothing differs that must be equal, and nothing failed. Refusals count for our method only: vLLM documents
        which parameters its own methods refuse.
        """
        is_refused = self.is_ours and any(group.refusal is not None for group in self.groups)
        has_failed = any(group.failure is not None for group in self.groups)
        return not is_refused and not has_failed and not any(group.different for group in self.groups)


def verify(task: Task, logs: Path, report: Report) -> Verification:
    """Raises ValueError with vLLM's cause if an engine does not start or plain vLLM fails. logs: folder of the logs."""
    with closing(_Engine(PLAIN, task, logs, report)) as plain:
        groups = [greedy_group(task.prompts, task.max_tokens)]
        expected = [_plain_answers(plain, groups[0])]
        groups += other_groups(task.prompts, task.max_tokens, expected[0])
        expected += [_plain_answers(plain, group) for group in groups[1:]]
    with closing(_Engine(SPECULATIVE, task, logs, report)) as speculative:
        results = [_compare(speculative, group, answers) for group, answers in zip(groups, expected)]
        return Verification(speculative.facts, speculative.acceptance_length, tuple(results))


def _plain_answers(engine: _Engine, group: Group) -> Sequence[Answer]:
    try:
        answers = engine.ask(group, group.logits_mode)
        if group.asks_logprobs:
            # vLLM returns either log probabilities or logits. In 16 bits the second answer may be another one.
            answers = [
                dataclasses.replace(first, logprobs=second.logprobs) if first.token_ids == second.token_ids else first
                for first, second in zip(answers, engine.ask(group, None))
            ]
    except (Refused, MethodFailed) as error:
        raise ValueError(f"plain vLLM fails in the group {group.name!r}: {error} (log: {engine.log})") from error
    engine.report_done(group)
    return answers


def _compare(engine: _Engine, group: Group, expected: Sequence[Answer]) -> GroupResult:
    try:
        found = engine.ask(group, None)
    except Refused as error:
        return GroupResult.refused(group, str(error))
    except MethodFailed as error:
        return GroupResult.failed(group, str(error))
    finally:
        engine.report_done(group)
    dtype: torch.dtype = getattr(torch, engine.facts.dtype)
    # vLLM's rejection sampler draws other random numbers than plain sampling; in 16 bits no rule tells a draw that
    # rounding has changed from a wrong one.
    promises_sampled = engine.facts.method == OUR_METHOD and dtype == torch.float32
    return judge_group(group, expected, found, dtype, promises_sampled)


class Refused(Exception):
    """vLLM's message about parameters that it does not support."""


class _Engine:
    """An engine process; after a failure it is started again for the next group, MAX_FAILURES times at most."""

    def __init__(self, name: str, task: Task, logs: Path, report: Report) -> None:
        self._name, self._task, self._logs, self._report = name, task, logs, report
        self._process: MethodProcess | None = None
        self._failures: list[str] = []
        self.acceptance_length: float | None = None
        """Since the last start; None where nothing was drafted."""
        self._start()

    @property
    def log(self) -> Path:
        return self._logs / f"{self._name}-{len(self._failures) + 1}.log"

    def ask(self, group: Group, logits_mode: str | None) -> list[Answer]:
        """The group's answers. Raises Refused, or MethodFailed if the engine fails or has failed too often before."""
        if len(self._failures) == MAX_FAILURES:
            raise MethodFailed(f"not asked, because the engine has failed {MAX_FAILURES} times")
        if self._process is None:
            self._start()
        assert self._process is not None
        try:
            arguments = {"asks": group.asks, "are_alone": group.are_alone, "logits_mode": logits_mode}
            answers = self._process.call("answer", **arguments)
            if self._name == SPECULATIVE:
                self.acceptance_length = self._process.call("acceptance_length")
        except MethodFailed as error:
            self.close()
            self._failures.append(str(error))
            raise
        if isinstance(answers, str):
            raise Refused(answers)
        return list(answers)

    def report_done(self, group: Group) -> None:
        self._report(TITLES[self._name], group.name, 1)

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _start(self) -> None:
        self._report(TITLES[self._name], "starting", 0)
        options = dict(self._task.engine)
        if self._name == SPECULATIVE:
            options["speculative_config"] = self._task.speculative_config
        self._process = MethodProcess(self.log)
        try:
            # As it would be served, without what `bench` corrects in vLLM's rejection sampler.
            arguments = {"target": self._task.target, "options": options, "mends_sampling": False}
            self.facts: EngineFacts = self._process.call("start", **arguments)
        except MethodFailed as error:
            self.close()
            raise ValueError(f"{TITLES[self._name]}: vLLM does not start: {error} (log: {self.log})") from error
