"""Psi of prefixes for emissions with a blank, where the last token of a prefix may be emitted at several frames.

Both families have the same recursion. The state of a prefix h = y_1 .. y_j is the row

    arrive_t(h) = P(h is complete exactly at frame t, where its last token is emitted),

so psi(h) = sum_t arrive_t(h), and appending a token c takes one product with a T x T matrix:

    arrive_t(h.c) = p_t(c | h) * before_t(h),    before_t(h) = sum_{s < t} arrive_s(h) * wait_{s,t}(h)

where wait_{s,t}(h) = P(frames s+1 .. t-1 add nothing, after h was complete at s). In the conditioned family these
frames are blank. In the independent family they repeat the last token u and are then blank; if c = u, at least one of
them must be blank. before_t is gamma_n + gamma_b at t-1 of Graves et al. 2006, section 3.2, with the recursion over
frames written as a sum.

An emission is a product of a factor of the frame, a factor of the prefix, and a normaliser,

    p_t(c | h) = frame_t(c) * lift_h(c) / total_t(h),

so that the psi of all children of a level is one matrix product over the frames. Without a blank that product would
have one term; prefix_tree.py has that case.

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
    """Conditioned emissions with a blank."""

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
        """The children of prefixes with psi [R, M]; weight: [R, M, T], before_t(h) / total_t(h)."""

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
    """[..., T], for each frame the probability that all frames before it are blank; blank: [..., T]."""
    return F.pad(blank.cumprod(-1)[..., :-1], (1, 0), value=1.0)


def _runs(label: Tensor) -> Tensor:
    """[..., T, T], entry s, t: the product of `label` [..., T] over frames s+1 .. t; 1 if s = t, 0 if s > t."""
    frame = torch.arange(label.shape[-1], device=label.device)
    return torch.where(frame > frame[:, None], label[..., None, :], 1.0).cumprod(-1).triu()


def _before(at: Tensor) -> Tensor:
    """[..., T, T], entry s, t: `at` [..., T, T] at s, t-1; 0 for the first frame."""
    return F.pad(at[..., :-1], (1, 0))
