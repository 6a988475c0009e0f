"""The requests: groups of them with different sampling parameters, over the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ctc_spec.bench.records import Answer, Ask

NUM_ALONE = 4
"""Requests of a group that runs one at a time."""

NUM_GROUPS = 14

SEED = 1000
"""Request i samples with SEED + i."""

MIN_MAX_TOKENS = 16
"""Answers must be long enough for stop strings, banned tokens and `min_tokens` to take effect inside them."""


@dataclass(frozen=True)
class Group:
    name: str
    asks: tuple[Ask, ...]
    are_alone: bool = False
    """One request at a time, instead of all in one batch."""

    @property
    def logits_mode(self) -> str | None:
        """vLLM's `logprobs_mode` for the logits that tell near-ties; None where all requests are sampled.

        Processed logits include penalties and bans. In a batch with sampled requests vLLM returns them on some
        platforms only, so the greedy requests of such a batch have no parameter that changes logits: raw ones will do.
        """
        greedy = [ask.is_greedy for ask in self.asks]
        if not any(greedy):
            return None
        return "processed_logits" if all(greedy) else "raw_logits"

    @property
    def asks_logprobs(self) -> bool:
        return any("logprobs" in ask.params for ask in self.asks)


def greedy_group(prompts: Sequence[tuple[int, ...]], max_tokens: int) -> Group:
    return _group("greedy", prompts, [{"temperature": 0.0, "max_tokens": max_tokens}] * len(prompts))


def other_groups(prompts: Sequence[tuple[int, ...]], max_tokens: int, greedy: Sequence[Answer]) -> list[Group]:
    """greedy: plain vLLM's answers to `greedy_group`; stop strings, bans and the like are taken from their middle."""

    common = {"temperature": 0.0, "max_tokens": max_tokens}

    def batch(name: str, **params: Any) -> Group:
        return _group(name, prompts, [common | params] * len(prompts))

    def alone(name: str, **params: Any) -> Group:
        chosen = prompts[:NUM_ALONE]
        return _group(name, chosen, [common | params] * len(chosen), are_alone=True)

    def batch_of(name: str, params: list[dict[str, Any]]) -> Group:
        return _group(name, prompts, [common | own for own in params])

    penalties: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, **penalties},
    ]
    # Greedy groups first, because vLLM's own methods may fail on sampled ones.
    return [
        alone("greedy, alone"),
        batch("penalties", **penalties),
        batch_of("logit bias", [_bias(answer) for answer in greedy]),
        batch_of("stop strings", [_stop_string(answer) for answer in greedy]),
        batch_of("min_tokens", [_min_tokens(answer) for answer in greedy]),
        batch_of("max_tokens 1 to 13", [{"max_tokens": 1 + index % 13} for index in range(len(prompts))]),
        batch("log probabilities", logprobs=3),
        batch_of("greedy and sampled", [kinds[index % len(kinds)] for index in range(len(prompts))]),
        batch("t=0.7, top-p", temperature=0.7, top_p=0.9),
        batch("t=0.7, penalties", temperature=0.7, **penalties),
        alone("t=1, alone", temperature=1.0),
        batch("t=1, min-p", temperature=1.0, min_p=0.05),
        batch("t=1, top-k", temperature=1.0, top_k=50),
    ]


def _group(
    name: str, prompts: Sequence[tuple[int, ...]], params: Sequence[dict[str, Any]], are_alone: bool = False
) -> Group:
    asks = [
        Ask(prompt, each if each["temperature"] == 0 else {"seed": SEED + index, **each})
        for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
    ]
    return Group(name, tuple(asks), are_alone)


def _bias(answer: Answer) -> dict[str, Any]:
    """Bans one token of the answer and prefers another."""
    tokens = answer.token_ids
    return {"logit_bias": {tokens[len(tokens) // 3]: -100.0, tokens[-1]: 2.0}}


def _stop_string(answer: Answer) -> dict[str, Any]:
    middle = len(answer.text) // 2
    stop = answer.text[middle : middle + 4]
    return {"stop": [stop]} if stop else {}


def _min_tokens(answer: Answer) -> dict[str, Any]:
    """Stop tokens that end the answer early, but not before its eighth token."""
    return {"stop_token_ids": sorted({*answer.token_ids[2:12:3]}), "min_tokens": 8}
