"""Messages between the terminal's process and the engine's process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Start:
    """The first message. options: for `vllm.LLM`."""

    target: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Started:
    dtype: str
    max_model_len: int


@dataclass(frozen=True)
class Failed:
    """vLLM raised: the exception's class and message. The engine's process ends after it."""

    cause: str


@dataclass(frozen=True)
class Sampling:
    """Sampling options of the command line. Raises ValueError that names the option."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    """Used anew for each answer."""
    max_tokens: int = 1024
    """Most tokens of an answer."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"--temperature {self.temperature}: use 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: use a number above 0 and up to 1.")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens {self.max_tokens}: use at least 1.")


@dataclass(frozen=True)
class Question:
    """Answered by one Chunk for each decoding step that emitted tokens, then Ended."""

    prompt: list[int]
    """Token ids of the whole conversation."""
    sampling: Sampling


@dataclass(frozen=True)
class Chunk:
    """One decoding step."""

    text: str
    """Whole characters only: the bytes of an incomplete one come with a later chunk."""
    num_tokens: int


@dataclass(frozen=True)
class Ended:
    reason: Literal["stop", "length", "abort"]
    seconds: float
    """Since the engine was given the question."""


@dataclass(frozen=True)
class StopAnswer:
    """To the engine's process, while it answers."""


@dataclass(frozen=True)
class ShowTree:
    """Answered by a VerifiedTree, or None if no step has verified one."""


@dataclass(frozen=True)
class VerifiedTree:
    """The last token tree that the target verified. Node i in 1..N is entry i - 1 of the lists, node 0 the anchor."""

    anchor: int
    """Token id of the anchor."""
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    probabilities: list[float]
    """Prefix probabilities."""
    accepted: list[int]
    """Nodes of the accepted path."""
    emitted: list[int]
    """Token ids of that path, then of the target's own token."""
