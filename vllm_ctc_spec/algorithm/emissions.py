"""Emission probabilities of a few candidate tokens, computed from frame logits; the tree builders read them.

Two families of emission, over V tokens and a blank, which is column V of the logits:

* independent: p_t(c), plain CTC (Graves et al. 2006, section 3.1): repeats merge, blanks drop;
* conditioned: p_t(c | h) = softmax_c(frame_t[c] + (s(h) * gate) . B[c]), where h is the emitted prefix and its state is
  a linear recurrence, s(h.c) = A[c] + W s(h). One label per frame, the rest blank, nothing merges. Without a blank
  (no column V) token j stands at frame j, as in a drafter that is trained with cross-entropy per position; rank 0
  makes the positions independent.

Shapes are fixed and nothing waits for the device, so that CUDA graphs can capture the functions.

If a drafter drafts only some tokens, logits have a column for each of them, and `drafted` has their ids.

Letters: R requests, T frames, V vocabulary without blank, K tokens of it that are drafted (V where no `drafted` is
given), C candidates, r rank of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The tables of the conditioned family, of one floating type."""

    state_in: Tensor
    """[V, r], the table A."""
    transition: Tensor
    """[r, r], the matrix W."""
    logit_out: Tensor
    """[V, r], the table B; with a blank [V + 1, r], blank last."""

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """[..., r], the state s(h.c), from s(h) [..., r] and c [...] int64."""
        return F.embedding(tokens, self.state_in) + state @ self.transition.T


@dataclass(frozen=True)
class IndependentEmissions:
    """Log probabilities of C distinct candidate tokens in each frame; normalised over all K + 1 labels."""

    tokens: Tensor
    """[R, C] int64, distinct within a request."""
    token_logp: Tensor
    """[R, T, C] float32, log p_t(c)."""
    blank_logp: Tensor
    """[R, T] float32, log p_t(blank)."""


@dataclass(frozen=True)
class ConditionedEmissions:
    """Log probabilities of C distinct candidate tokens in each frame before conditioning, and the conditioning."""

    tokens: Tensor
    """[R, C] int64, distinct within a request."""
    token_logp: Tensor
    """[R, T, C] float32, log softmax(frame_t)[c]."""
    blank_logp: Tensor | None
    """[R, T] float32; None without a blank."""
    tail_mass: Tensor
    """[R, T] float32, total probability of the labels that are not candidates. They get no bias."""
    start: Tensor
    """[R, r], the state of the empty prefix."""
    gate: Tensor
    """[R, r]"""
    conditioning: Conditioning

    def logit_rows(self) -> Tensor:
        """[R, C, r], rows gate * B of the candidates; with a blank [R, C + 1, r], blank last."""
        labels = self.tokens
        if self.blank_logp is not None:
            labels = F.pad(labels, (0, 1), value=len(self.conditioning.state_in))
        return F.embedding(labels, self.conditioning.logit_out) * self.gate[:, None]


def independent_emissions(logits: Tensor, num_candidates: int, drafted: Tensor | None = None) -> IndependentEmissions:
    """Emissions of the min(K, num_candidates) tokens whose largest probability in any frame is highest.

    logits: [R, T, K + 1], any floating type, blank last; -inf is allowed, but not for all labels of a frame.
    drafted: [K] int64, distinct token ids.
    Raises ValueError if the shape or num_candidates is unusable.
    """
    _check(logits, num_candidates)
    logp = logits.float().log_softmax(-1)
    columns = _top_columns(logp[..., :-1], num_candidates)
    return IndependentEmissions(_tokens(columns, drafted), _take(logp, columns), logp[..., -1])


def conditioned_emissions(
    logits: Tensor,
    start: Tensor,
    gate: Tensor,
    conditioning: Conditioning,
    num_candidates: int,
    drafted: Tensor | None = None,
) -> ConditionedEmissions:
    """Emissions of the min(K, num_candidates) tokens whose largest probability in any frame, without bias, is highest.

    The normaliser is exact if all K tokens are candidates. Otherwise the other labels enter it as one mass without
    bias, which neglects the mass that a state's bias would move to or from them.

    logits: [R, T, K], or with a blank [R, T, K + 1], blank last; start: [R, r], the state of the empty prefix;
    gate: [R, r]; drafted: [K] int64, distinct.
    Raises ValueError if shapes disagree or num_candidates is unusable.
    """
    _check(logits, num_candidates)
    num_tokens = len(conditioning.state_in)
    num_columns = num_tokens if drafted is None else len(drafted)
    num_blanks = logits.shape[-1] - num_columns
    if num_blanks not in (0, 1) or len(conditioning.logit_out) != num_tokens + num_blanks:
        raise ValueError(
            f"condition tables of {num_tokens} and {len(conditioning.logit_out)} rows for logits over "
            f"{logits.shape[-1]} labels, of which {num_columns} are tokens: the first needs one row per token, the "
            f"second one per label, blank included."
        )
    logp = logits.float().log_softmax(-1)
    columns = _top_columns(logp[..., :num_columns], num_candidates)
    tokens = _tokens(columns, drafted)
    token_logp, blank_logp = _take(logp, columns), None
    tail_mass = 1 - token_logp.exp().sum(-1)
    if num_blanks:
        blank_logp = logp[..., -1]
        tail_mass -= blank_logp.exp()
    tail_mass.clamp_(min=0.0)
    if columns.shape[1] == num_columns:
        # All tokens are candidates, so the difference is rounding.
        tail_mass.zero_()
    return ConditionedEmissions(tokens, token_logp, blank_logp, tail_mass, start, gate, conditioning)


def _check(logits: Tensor, num_candidates: int) -> None:
    if logits.dim() != 3 or logits.shape[-1] < 2:
        raise ValueError(f"frame logits of shape {tuple(logits.shape)}: needs [requests, frames, tokens + blank].")
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}: needs at least one candidate token.")


def _top_columns(logp: Tensor, num_candidates: int) -> Tensor:
    """[R, C], the columns with the largest maximum over the frames of logp [R, T, K]."""
    best = logp.amax(1)
    return best.topk(min(best.shape[-1], num_candidates), dim=-1).indices


def _tokens(columns: Tensor, drafted: Tensor | None) -> Tensor:
    return columns if drafted is None else drafted[columns]


def _take(logp: Tensor, columns: Tensor) -> Tensor:
    """[R, T, C]: the `columns` [R, C] of logp [R, T, labels]."""
    return logp.gather(2, columns[:, None].expand(-1, logp.shape[1], -1))
