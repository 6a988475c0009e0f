"""CTC prefix probabilities, written as the equations: one request, plain Python loops, log space.

Tests compare the batched code in prefix_tree.py with it. Two families of emission over V tokens and a blank:

* independent (Graves et al. 2006, section 3.2): repeats merge, blanks drop;
* conditioned: one label per frame, the rest blank, nothing merges, and the frame's distribution depends on the
  emitted prefix, through a state that is a linear recurrence over its tokens.

A prefix h is a frozen record of its family. `extend` returns the record of h.c, `prefix_logp` is log psi(h), the log
probability that the collapsed output starts with h, and `end_logp` that it is exactly h. Impossible events have -inf,
never NaN.

Letters: T frames, V vocabulary without blank (which is column V), r rank of the condition tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from .emissions import Conditioning

_IMPOSSIBLE = -math.inf


def collapse(alignment: Sequence[int], blank: int) -> tuple[int, ...]:
    """The output of a CTC alignment: repeats merge, then blanks drop (Graves et al. 2006, section 3.1, map B)."""
    return tuple(label for label, _ in groupby(alignment) if label != blank)


@dataclass(frozen=True)
class IndependentPrefix:
    """A prefix h with the forward variables of Graves et al. 2006, section 3.2, over frames 0 .. T."""

    logp: Tensor
    """[T, V + 1] log p_t(k)."""
    tokens: tuple[int, ...]
    token_logp: tuple[float, ...]
    """log gamma_n: frames 1 .. t collapse to h and frame t is its last token."""
    blank_logp: tuple[float, ...]
    """log gamma_b: frames 1 .. t collapse to h and frame t is blank."""
    prefix_logp: float
    """log psi(h)."""

    @classmethod
    def root(cls, logp: Tensor) -> IndependentPrefix:
        blanks = [0.0]
        for frame in logp[:, -1].tolist():
            blanks.append(blanks[-1] + frame)
        return cls(logp, (), (_IMPOSSIBLE,) * len(blanks), tuple(blanks), 0.0)

    @property
    def end_logp(self) -> float:
        """log P(the collapsed output is exactly h)."""
        return _log_add((self.token_logp[-1], self.blank_logp[-1]))

    def extend(self, token: int) -> IndependentPrefix:
        repeats = self.tokens[-1:] == (token,)
        token_logp, blank_logp, new_logp = [_IMPOSSIBLE], [_IMPOSSIBLE], [_IMPOSSIBLE]
        for t, frame in enumerate(self.logp.tolist()):
            before = self.blank_logp[t] if repeats else _log_add((self.blank_logp[t], self.token_logp[t]))
            new_logp.append(before + frame[token])
            blank_logp.append(_log_add((blank_logp[t], token_logp[t])) + frame[-1])
            token_logp.append(_log_add((token_logp[t] + frame[token], new_logp[-1])))
        return IndependentPrefix(
            self.logp, (*self.tokens, token), tuple(token_logp), tuple(blank_logp), _log_add(new_logp)
        )


@dataclass(frozen=True)
class ConditionedPrefix:
    """A prefix h with its forward variable over frames 0 .. T, where p_t(c | h) = softmax_c(frame_t[c] + s(h).B[c])
    and s(h.c) = A[c] + W s(h).
    """

    frames: Tensor
    """[T, V + 1] frame logits."""
    conditioning: Conditioning
    state: Tensor
    """[r], s(h); at the root the start."""
    forward_logp: tuple[float, ...]
    """log alpha: frames 1 .. t emit exactly h."""
    prefix_logp: float
    """log psi(h)."""

    @classmethod
    def root(cls, frames: Tensor, conditioning: Conditioning, start: Tensor) -> ConditionedPrefix:
        before = cls(frames, conditioning, start, (), 0.0)
        forward = [0.0]
        for frame in before.emission_logp().tolist():
            forward.append(forward[-1] + frame[-1])
        return cls(frames, conditioning, start, tuple(forward), 0.0)

    @property
    def end_logp(self) -> float:
        """log P(the output is exactly h)."""
        return self.forward_logp[-1]

    def emission_logp(self) -> Tensor:
        """[T, V + 1] log p_t(k | h)."""
        return (self.frames + self.conditioning.logit_out @ self.state).log_softmax(-1)

    def extend(self, token: int) -> ConditionedPrefix:
        state = self.conditioning.state_in[token] + self.conditioning.transition @ self.state
        child = ConditionedPrefix(self.frames, self.conditioning, state, (), 0.0)
        forward, new_logp = [_IMPOSSIBLE], [_IMPOSSIBLE]
        frames = zip(self.emission_logp().tolist(), child.emission_logp()[:, -1].tolist(), strict=True)
        for t, (emission, child_blank) in enumerate(frames):
            new_logp.append(self.forward_logp[t] + emission[token])
            forward.append(_log_add((forward[t] + child_blank, new_logp[-1])))
        return ConditionedPrefix(self.frames, self.conditioning, state, tuple(forward), _log_add(new_logp))


def _log_add(values: Iterable[float]) -> float:
    values = tuple(values)
    peak = max(values)
    if peak == _IMPOSSIBLE:
        return _IMPOSSIBLE
    return peak + math.log(sum(math.exp(value - peak) for value in values))
