"""Differences between made-up answers are found and counted by their kind."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console

from vllm_ctc_spec.bench.records import Answer, Ask, EngineFacts
from vllm_ctc_spec.verify.groups import Group
from vllm_ctc_spec.verify.judge import GroupResult, Kind, judge_group
from vllm_ctc_spec.verify.report import as_json, lines, to_table
from vllm_ctc_spec.verify.run import Task, Verification

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
LOGITS = {5: 20.0, 6: 19.875, 7: 19.0}
PLAIN = Answer((1, 5, 2), "abc", "stop", None, logits=({1: 30.0}, LOGITS, {2: 30.0}))


def judged(
    *others: Answer, dtype: torch.dtype = FLOAT32, promises_sampled: bool = True, plain: Answer = PLAIN, **params: Any
) -> GroupResult:
    group = Group("group", tuple(Ask((9,), {"temperature": 0.0, **params}) for _ in others))
    return judge_group(group, [plain] * len(others), others, dtype, promises_sampled)


def other(**changes: Any) -> Answer:
    return dataclasses.replace(PLAIN, logits=(), **changes)


def test_the_same_answers_are_equal():
    result = judged(other(), other())
    assert (result.num_requests, result.equal, result.different, result.findings) == (2, 2, 0, ())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"token_ids": (1, 6, 2)}, "token 1 is 6, not 5"),
        ({"token_ids": (1, 5)}, "2 tokens, not 3"),
        ({"text": "abd"}, "text is 'abd', not 'abc'"),
        ({"finish_reason": "length"}, "finish_reason is 'length', not 'stop'"),
        ({"stop_reason": "c"}, "stop_reason is 'c', not None"),
    ],
)
def test_one_planted_difference_is_found(changes: dict[str, Any], what: str):
    result = judged(other(), other(**changes), other())
    assert (result.equal, result.different) == (2, 1)
    [finding] = result.findings
    assert (finding.request, finding.kind, finding.what) == (1, Kind.DIFFERENT, what)


def test_near_ties_count_in_16_bits_only():
    one_step, eight_steps = other(token_ids=(1, 6, 2)), other(token_ids=(1, 7, 2))
    result = judged(one_step, eight_steps, dtype=BFLOAT16)
    assert (result.near_tie, result.different) == (1, 1)
    assert (result.largest_gap, result.largest_steps) == (1.0, 8.0)
    assert judged(one_step).different == 1


def test_a_token_that_the_target_finds_unlikely_is_different():
    result = judged(other(token_ids=(1, 8, 2)), dtype=BFLOAT16)
    assert (result.different, result.largest_gap) == (1, None)


def test_sampled_answers_differ_only_where_they_may():
    sampled = other(token_ids=(1, 6, 2))
    assert judged(sampled, temperature=1.0).different == 1
    result = judged(sampled, temperature=1.0, promises_sampled=False)
    assert (result.different, result.not_promised, result.findings[0].kind) == (0, 1, Kind.NOT_PROMISED)
    # Logits say nothing about a draw.
    assert result.largest_gap is None


def test_log_probabilities_are_compared_over_the_shared_tokens():
    plain = dataclasses.replace(PLAIN, logprobs=({1: -0.1}, {5: -0.5, 6: -0.7}, {2: -0.2}))
    close = dataclasses.replace(plain, logprobs=({1: -0.1}, {5: -0.50005, 6: -0.7}, {2: -0.2}))
    apart = dataclasses.replace(plain, logprobs=({1: -0.1}, {5: -0.52, 6: -0.7}, {2: -0.2}))
    parted = dataclasses.replace(apart, token_ids=(4, 5, 2))
    assert judged(close, plain=plain).equal == 1
    assert judged(apart, plain=plain).findings[0].what == "log probabilities differ by 0.02"
    assert judged(apart, plain=plain, dtype=BFLOAT16).equal == 1
    assert judged(apart, plain=plain, dtype=BFLOAT16).largest_logprob_difference == pytest.approx(0.02)
    assert judged(parted, plain=plain).largest_logprob_difference is None
    assert judged(other(), plain=plain).findings[0].what == "log probabilities of 0 tokens, not 3"


def verification(*groups: GroupResult, dtype: str = "float32", method: str = "ctc", **fields: Any) -> Verification:
    return Verification(EngineFacts(dtype, 512, False, method), fields.get("acceptance_length", 2.5), groups)


def printed(found: Verification) -> str:
    written = StringIO()
    Console(width=120, file=written).print(to_table(found), *lines(found), sep="\n")
    return written.getvalue()


def test_a_verification_holds_unless_something_differs_that_must_not():
    good = judged(other())
    bad = judged(other(), other(token_ids=(1, 6, 2)))
    assert verification(good).holds and "Exact: nothing differs" in printed(verification(good))
    text = printed(verification(good, bad))
    assert not verification(good, bad).holds
    assert "NOT EXACT: 1 requests" in text and "group, request 1: token 1 is 6, not 5 (gap 0.125)" in text
    assert "near-tie" not in text
    tied = judged(other(token_ids=(1, 6, 2)), dtype=BFLOAT16)
    assert verification(tied, dtype="bfloat16").holds and "near-tie" in printed(verification(tied, dtype="bfloat16"))


def test_what_vllms_own_methods_do_not_promise_is_told_and_not_held_against_them():
    drawn = judged(other(token_ids=(1, 6, 2)), temperature=1.0, promises_sampled=False)
    refused = GroupResult.refused(Group("bias", (Ask((9,), {"temperature": 0.0}),)), "min_p is not yet supported")
    found = verification(drawn, refused, method="ngram")
    assert found.holds
    text = printed(found)
    assert "other random numbers" in text and "bias: refused by vLLM: min_p is not yet supported" in text
    assert not verification(refused, method="ctc").holds
    died = GroupResult.failed(Group("top-k", (Ask((9,), {"temperature": 0.0}),)), "RuntimeError: empty")
    assert not verification(died, method="ngram").holds
    assert "top-k: failed: RuntimeError: empty" in printed(verification(died, method="ngram"))


def test_a_run_without_accepted_drafts_says_so():
    assert "No draft was accepted" in printed(verification(judged(other()), acceptance_length=None))


def test_the_json_has_every_difference():
    task = Task("target", {"method": "ctc"}, {"dtype": "float32"}, ((9,),), 16)
    fields = json.loads(json.dumps(as_json(task, verification(judged(other(token_ids=(1, 6, 2)))))))
    assert (fields["holds"], fields["facts"]["method"]) == (False, "ctc")
    assert fields["groups"][0]["findings"][0]["kind"] == "different"
