"""Asks plain vLLM, then vLLM with the speculative method: one engine at a time, each in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
"""Takes the engine's title, what it is doing, and how many groups it has answered since the last call."""

PLAIN = "plain"
SPECULATIVE = "speculative"
TITLES = {PLAIN: "plain vLLM", SPECULATIVE: "with speculation"}
OUR_METHOD = "ctc"


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
    """Over all requests; None where nothing was drafted."""
    groups: tuple[GroupResult, ...]

    @property
    def is_ours(self) -> bool:
        return self.facts.method == OUR_METHOD

    @property
    def holds(self) -> bool:
        """Nothing differs that must not. Our method must take all parameters; vLLM documents that its own do not."""
        is_refused = self.is_ours and any(group.refusal is not None for group in self.groups)
        return not is_refused and not any(group.different for group in self.groups)


def verify(task: Task, logs: Path, report: Report) -> Verification:
    """Raises ValueError with vLLM's cause where an engine fails, or plain vLLM refuses a request."""
    with _engine(PLAIN, task, logs, report) as (plain, _):
        groups = [greedy_group(task.prompts, task.max_tokens)]
        expected = [_plain_answers(plain, groups[0])]
        report(TITLES[PLAIN], groups[0].name, 1)
        groups += other_groups(task.prompts, task.max_tokens, expected[0])
        for group in groups[1:]:
            expected.append(_plain_answers(plain, group))
            report(TITLES[PLAIN], group.name, 1)
    with _engine(SPECULATIVE, task, logs, report) as (speculative, facts):
        dtype: torch.dtype = getattr(torch, facts.dtype)
        results = []
        for group, answers in zip(groups, expected):
            found = speculative.call("answer", asks=group.asks, are_alone=group.are_alone, logits_mode=None)
            report(TITLES[SPECULATIVE], group.name, 1)
            if isinstance(found, str):
                results.append(GroupResult.refused(group, found))
                continue
            # vLLM's rejection sampler draws other random numbers than plain sampling; in 16 bits no rule can tell a
            # draw that rounding has flipped from a wrong one.
            promises_sampled = facts.method == OUR_METHOD and dtype == torch.float32
            results.append(judge_group(group, answers, found, dtype, promises_sampled))
        return Verification(facts, speculative.call("acceptance_length"), tuple(results))


def _plain_answers(process: MethodProcess, group: Group) -> Sequence[Answer]:
    def ask(logits_mode: str | None) -> list[Answer]:
        answers = process.call("answer", asks=group.asks, are_alone=group.are_alone, logits_mode=logits_mode)
        if isinstance(answers, str):
            raise ValueError(f"plain vLLM refuses the requests of the group {group.name!r}: {answers}")
        return list(answers)

    answers = ask(group.logits_mode)
    if not group.asks_logprobs or group.logits_mode is None:
        return answers
    # vLLM returns log probabilities or logits, not both. In 16 bits the second text may be another one.
    return [
        dataclasses.replace(first, logprobs=second.logprobs) if first.token_ids == second.token_ids else first
        for first, second in zip(answers, ask(None))
    ]


@contextmanager
def _engine(name: str, task: Task, logs: Path, report: Report) -> Iterator[tuple[MethodProcess, EngineFacts]]:
    options = dict(task.engine)
    if name == SPECULATIVE:
        options["speculative_config"] = task.speculative_config
    log = logs / f"{name}.log"
    report(TITLES[name], "starting", 0)
    process = MethodProcess(log)
    try:
        # As it would be served: what `bench` mends in vLLM's samplers stays here as it is.
        facts = process.call("start", target=task.target, options=options, mends_sampling=False)
        yield process, facts
    except MethodFailed as error:
        raise ValueError(f"vLLM failed {'without' if name == PLAIN else 'with'} speculation: {error} Its log is "
                         f"{log}.") from error  # fmt: skip
    finally:
        process.close()
