"""Emissions with a blank, where a prefix may be completed at several frames.

Both families of emissions are read as one process. The state of a prefix h = y_1 .. y_j is the row

    arrive_t(h) = P(the last token of h is emitted, and h thereby completed, exactly at frame t),

so psi(h) = sum_t arrive_t(h), and one more token c costs one product with a T x T matrix:

    arrive_t(h.c) = p_t(c | h) * before_t(h),    before_t(h) = sum_{s < t} arrive_s(h) * wait_{s,t}(h)

where wait_{s,t}(h) = P(nothing is added in frames s+1 .. t-1 after h was completed at s). In the conditioned family
that is a run of blanks. In the independent one it is a run of the last token u, then a run of blanks (Graves et al.
2006, section 3.2, whose gamma_n + gamma_b at t-1 it sums to); if c repeats u, at least one blank must lie between.
The sums over s are the forward variables of the paper, unrolled.

An emission is a product of what the frame says, what the prefix says and a normaliser of the two,

    p_t(c | h) = frame_t(c) * lift_h(c) / total_t(h),

so that psi of all children of all prefixes of a level is one product over the frames, before they exist. Where no
frame is blank, that product has one term.

Letters: R requests, T frames, C candidates, M prefixes kept at a level, r rank of the conditioning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .emissions import ConditionedEmissions, IndependentEmissions
from .levels import Children, Chosen, Level, request_rows

_TINY = torch.finfo(torch.float32).tiny


class IndependentProcess:
    def __init__(self, emissions: IndependentEmissions) -> None:
        self._frames = emissions.token_logp.exp()
        token_runs = _runs(self._frames.mT)
        self._blank = emissions.blank_logp.exp()
        blank_runs = _runs(self._blank)[:, None]
        self._wait = _before(token_runs @ blank_runs)
        self._wait_repeat = _before(token_runs @ blank_runs.triu(1))

    def first(self) -> Children:
        before = _all_blank(self._blank)[:, None]

        def arrive(chosen: Chosen) -> Tensor:
            return before * self._frames.mT[chosen.request, chosen.column]

        return Children(torch.ones_like(before[..., 0]), before[..., :0], before @ self._frames, arrive)

    def children(self, level: Level, depth: int) -> Children:
        last = request_rows(level.candidates), level.candidates
        arrived = level.arrive[:, :, None]
        before, before_repeat = ((arrived @ wait[last])[:, :, 0] for wait in (self._wait, self._wait_repeat))
        repeated = (before_repeat * self._frames.mT[last]).sum(-1, keepdim=True)

        def arrive(chosen: Chosen) -> Tensor:
            parent = chosen.request, chosen.row
            repeats = (level.candidates[parent] == chosen.column)[..., None]
            return before_repeat[parent].where(repeats, before[parent]) * self._frames.mT[chosen.request, chosen.column]

        psi = (before @ self._frames).scatter_(2, level.candidates[..., None], repeated)
        return Children(level.psi, level.states, psi, arrive)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return states


class ConditionedProcess:
    """With blanks, so that a prefix may arrive at any frame."""

    def __init__(self, emissions: ConditionedEmissions, blank_logp: Tensor) -> None:
        self._emissions = emissions
        self._frames = emissions.token_logp.exp()
        self._labels = torch.cat((self._frames, blank_logp.exp()[..., None]), dim=-1)
        self._logit_rows = emissions.logit_rows().mT

    def _given(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """lift [R, M, C] and total [R, M, T], each relative to the largest bias, and p_t(blank | h) [R, M, T]."""
        bias = states.bmm(self._logit_rows).float()
        peak = bias.amax(-1, keepdim=True).clamp_(min=0.0)
        lift = bias.sub_(peak).exp_()
        total = lift @ self._labels.mT
        total = total.addcmul_((-peak).exp_(), self._emissions.tail_mass[:, None]).clamp_(min=_TINY)
        return lift[..., :-1], total, lift[..., -1:] * self._labels[:, None, :, -1] / total

    def _children(self, psi: Tensor, states: Tensor, weight: Tensor, lift: Tensor) -> Children:
        """Of prefixes with psi [R, M]; weight: [R, M, T] before_t(h) / total_t(h)."""

        def arrive(chosen: Chosen) -> Tensor:
            own_lift = lift[chosen.request, chosen.row, chosen.column][..., None]
            return weight[chosen.request, chosen.row] * self._frames.mT[chosen.request, chosen.column] * own_lift

        return Children(psi, states, (weight @ self._frames).mul_(lift), arrive)

    def first(self) -> Children:
        start = self._emissions.start[:, None]
        lift, total, blank = self._given(start)
        weight = _all_blank(blank) / total
        return self._children(torch.ones_like(weight[..., 0]), start, weight, lift)

    def children(self, level: Level, depth: int) -> Children:
        lift, total, blank = self._given(level.states)
        before = (level.arrive[:, :, None] @ _before(_runs(blank)))[:, :, 0]
        return self._children(level.psi, level.states, before / total, lift)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self._emissions.conditioning.advance(states, tokens)


def _all_blank(blank: Tensor) -> Tensor:
    """[..., T] from [..., T]: the probability that all frames before each are blank."""
    return F.pad(blank.cumprod(-1)[..., :-1], (1, 0), value=1.0)


def _runs(label: Tensor) -> Tensor:
    """[..., T, T] from [..., T]: the product of frames s+1 .. t of `label`, 1 where s = t, 0 where s > t."""
    frame = torch.arange(label.shape[-1], device=label.device)
    return torch.where(frame > frame[:, None], label[..., None, :], 1.0).cumprod(-1).triu()


def _before(at: Tensor) -> Tensor:
    """The values [..., s, t] of the frame before each frame t, zero for the first."""
    return F.pad(at[..., :-1], (1, 0))
