"""What a method's process hands to the benchmark, and the work that the benchmark hands to it.

Letters: P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    """1: all tokens."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def file_part(self) -> str:
        return str(self).replace(", ", "-").replace(" ", "")

    def __str__(self) -> str:
        """temperature 0.2, top-p 0.9"""
        return f"temperature {self.temperature:g}" + (f", top-p {self.top_p:g}" if self.top_p < 1 else "")


@dataclass(frozen=True)
class Workload:
    """One pass over the prompts of a cell."""

    prompts: tuple[tuple[int, ...], ...]
    """[P] token ids"""
    max_tokens: tuple[int, ...]
    """[P], of the answer"""
    temperature: float
    seed: int
    """Prompt i samples with seed + i."""
    batch_size: int
    """Requests in flight: the next one is added when one ends."""
    ignore_eos: bool = False
    top_p: float = 1.0


@dataclass(frozen=True)
class Drafts:
    """vLLM's own per-request counters (`per_request_spec_decode_metrics`)."""

    steps_by_accepted: tuple[int, ...]
    """Entry j: steps with a draft of which j tokens were accepted."""
    num_nodes: int
    """Draft tokens that were verified."""


@dataclass(frozen=True)
class Request:
    """One answer; times in seconds."""

    token_ids: tuple[int, ...]
    num_steps: int
    """Target steps that emitted its tokens, the prefill included."""
    total_time: float
    """From handing it to the engine until its last token."""
    first_token_time: float
    """From its arrival until its first token (vLLM's `first_token_latency`)."""
    decode_time: float
    """From its first token until its last (vLLM's time stamps)."""
    drafts: Drafts | None


@dataclass(frozen=True)
class Pass:
    seconds: float
    """From the first request's start to the last one's end."""
    requests: tuple[Request, ...]
    """[P]"""

    @property
    def tokens_per_second(self) -> float:
        return sum(len(request.token_ids) for request in self.requests) / self.seconds


@dataclass(frozen=True)
class Branching:
    """Where an answer leaves plain vLLM's: both continue the same text."""

    prompt: tuple[int, ...]
    """The prompt and what both answers share, token ids."""
    plain_token: int
    other_token: int


@dataclass(frozen=True)
class Gap:
    """Between the target's best token and the worse of a branching's two."""

    logits: float
    """Their logits' difference, which is that of their log probabilities, too."""
    top_logit: float
    """The best token's logit."""


@dataclass(frozen=True)
class Ask:
    """A request of `vllm-ctc-spec verify`."""

    prompt: tuple[int, ...]
    params: dict[str, Any]
    """Of vLLM's `SamplingParams`; `temperature` is there."""

    @property
    def is_greedy(self) -> bool:
        return bool(self.params["temperature"] == 0)


@dataclass(frozen=True)
class Answer:
    """All that a user sees of one answer, and its logits where they were asked for."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: tuple[dict[int, float], ...] = ()
    """For each token those that the request asked for."""
    logits: tuple[dict[int, float], ...] = ()
    """For each token the most likely tokens' logits, in place of `logprobs`."""


@dataclass(frozen=True)
class EngineFacts:
    """What vLLM made of the options."""

    dtype: str
    max_model_len: int
    is_eager: bool
    method: str | None = None
    """The speculative one."""
