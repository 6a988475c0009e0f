"""Messages between the benchmark and the methods' processes: work in one direction, results in the other.

Letters: P prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    """1 keeps all tokens."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def file_part(self) -> str:
        return str(self).replace(", ", "-").replace(" ", "")

    def __str__(self) -> str:
        """Such as "temperature 0.2, top-p 0.9"."""
        return f"temperature {self.temperature:g}" + (f", top-p {self.top_p:g}" if self.top_p < 1 else "")


@dataclass(frozen=True)
class Workload:
    """One pass over the prompts of a cell."""

    prompts: tuple[tuple[int, ...], ...]
    """[P] token ids"""
    max_tokens: tuple[int, ...]
    """[P], most tokens of each answer"""
    temperature: float
    seed: int
    """Prompt i samples with seed + i."""
    batch_size: int
    """Requests in flight; when one ends, the next is added."""
    ignore_eos: bool = False
    top_p: float = 1.0


@dataclass(frozen=True)
class Drafts:
    """vLLM's counters of one request (`per_request_spec_decode_metrics`)."""

    steps_by_accepted: tuple[int, ...]
    """Entry j: number of steps with a draft that accepted j draft tokens."""
    num_nodes: int
    """Verified draft tokens."""


@dataclass(frozen=True)
class Request:
    """One answer; times in seconds."""

    token_ids: tuple[int, ...]
    num_steps: int
    """Target steps that emitted tokens, the prefill included."""
    total_time: float
    """From handing the request to the engine until its last token."""
    first_token_time: float
    """From arrival until the first token (vLLM's `first_token_latency`)."""
    decode_time: float
    """From the first token until the last (vLLM's time stamps)."""
    drafts: Drafts | None
    """None without a speculative method."""


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
    """The first position at which an answer differs from plain vLLM's."""

    prompt: tuple[int, ...]
    """Token ids of the prompt and of the text that both answers share."""
    plain_token: int
    other_token: int


@dataclass(frozen=True)
class Gap:
    """Distance of the target's best token to the less likely one of a branching's two tokens."""

    logits: float
    """Difference of the logits; log probabilities have the same difference."""
    top_logit: float
    """The best token's logit."""


@dataclass(frozen=True)
class Ask:
    """A request of `vllm-ctc-spec verify`."""

    prompt: tuple[int, ...]
    """Token ids."""
    params: dict[str, Any]
    """Arguments of vLLM's `SamplingParams`, `temperature` among them."""

    @property
    def is_greedy(self) -> bool:
        return bool(self.params["temperature"] == 0)


@dataclass(frozen=True)
class Answer:
    """One answer as a user sees it, with logits if they were asked for."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: tuple[dict[int, float], ...] = ()
    """For each token of the answer, the log probabilities that the request asked for, by token id."""
    logits: tuple[dict[int, float], ...] = ()
    """For each token of the answer, logits of the most likely tokens, in place of `logprobs`."""


@dataclass(frozen=True)
class EngineFacts:
    """The engine's settings as vLLM resolved them."""

    dtype: str
    max_model_len: int
    is_eager: bool
    method: str | None = None
    """The speculative method; None for plain vLLM."""
