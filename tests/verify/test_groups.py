from __future__ import annotations

from vllm_ctc_spec.bench.records import Answer
from vllm_ctc_spec.verify.groups import NUM_ALONE, NUM_GROUPS, greedy_group, other_groups

PROMPTS = tuple((index, index + 1) for index in range(6))
GREEDY = [Answer(tuple(range(20)), "the text of an answer", "length", None)] * 5 + [Answer((3,), "", "stop", None)]


def test_every_group_has_its_parameters():
    groups = [greedy_group(PROMPTS, 32), *other_groups(PROMPTS, 32, GREEDY)]
    assert len(groups) == NUM_GROUPS == len({group.name for group in groups})
    for group in groups:
        assert len(group.asks) == (NUM_ALONE if group.are_alone else len(PROMPTS))
        assert all(ask.is_greedy != ("seed" in ask.params) for ask in group.asks)
    named = {group.name: group for group in groups}
    assert named["greedy"].logits_mode == "processed_logits"
    assert named["t=1, top-k"].logits_mode is None
    assert [group.name for group in groups if group.asks_logprobs] == ["log probabilities"]
    mixed = named["greedy and sampled"]
    assert mixed.logits_mode == "raw_logits"
    # Raw logits say which of two tokens wins only where nothing changes them.
    assert all(set(ask.params) == {"temperature", "max_tokens"} for ask in mixed.asks if ask.is_greedy)


def test_stops_and_bans_come_from_plain_answers():
    named = {group.name: group for group in other_groups(PROMPTS, 32, GREEDY)}
    first, *_, last = named["stop strings"].asks
    assert first.params["stop"][0] in GREEDY[0].text and "stop" not in last.params
    assert named["logit bias"].asks[0].params["logit_bias"] == {6: -100.0, 19: 2.0}
    assert named["min_tokens"].asks[0].params["stop_token_ids"] == [2, 5, 8, 11]
