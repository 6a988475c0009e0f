"""The drafter's most probable next token along a given text, exact over the whole vocabulary, for evaluation.

A tree has only the children that fit its node budget. Here every token c is compared by its
psi(h.c) = sum_t phi_{t-1}(h) p_t(c | h), with the forward variables phi of ctc.py, batched and in log space.

Letters: R requests, T frames, U tokens of text, V vocabulary without blank, r rank of the conditioning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .emissions import Conditioning


def independent_next_tokens(logits: Tensor, path: Tensor) -> Tensor:
    """[R, U] int64, argmax_c psi(path[:d].c) for d = 0 .. U - 1, for independent emissions; -1 if all psi are 0.

    logits: [R, T, V + 1], blank last. path: [R, U] int64, U <= T.
    """
    logp = logits.float().log_softmax(-1)
    probability, blank = logp.exp(), logp[..., -1]
    blank_logp = _forward(_certain_start(blank), blank)
    token_logp = torch.full_like(blank_logp, -torch.inf)
    # At the root only blanks come before, so the choice of the previous token does not matter.
    last = torch.cat((path[:, :1], path[:, :-1]), dim=1)
    best = []
    for previous, token in zip(last.T, path.T, strict=True):
        either_logp = torch.logaddexp(token_logp, blank_logp)
        psi = _children(either_logp, either_logp, probability[..., :-1])
        repeated = _children(blank_logp, either_logp, _column(probability, previous)[..., None])
        best.append(_most_probable(psi.scatter(1, previous[:, None], repeated)))
        emission = _column(logp, token)
        before_logp = blank_logp.where((previous == token)[:, None], either_logp)
        token_logp = _forward(_arrival(before_logp, emission), emission)
        blank_logp = _forward(_arrival(token_logp, blank), blank)
    return torch.stack(best, dim=1)


def conditioned_next_tokens(
    logits: Tensor, start: Tensor, gate: Tensor, conditioning: Conditioning, path: Tensor
) -> Tensor:
    """[R, U] int64, argmax_c psi(path[:d].c) for d = 0 .. U - 1, for conditioned emissions; -1 if all psi are 0.

    logits: [R, T, V], or with a blank [R, T, V + 1], blank last. start, gate: [R, r], see emissions.py.
    path: [R, U] int64, U <= T.
    """
    frames, logit_out = logits.float(), conditioning.logit_out
    if logits.shape[-1] == len(conditioning.state_in):
        frames, logit_out = F.pad(frames, (0, 1), value=-torch.inf), F.pad(logit_out, (0, 0, 0, 1))
    arrival_logp = _certain_start(frames[..., -1])
    best, state = [], start
    for token in path.T:
        bias = ((state * gate) @ logit_out.T).float()
        logp = (frames + bias[:, None]).log_softmax(-1)
        forward_logp = _forward(arrival_logp, logp[..., -1])
        best.append(_most_probable(_children(forward_logp, forward_logp, logp[..., :-1].exp())))
        arrival_logp = _arrival(forward_logp, _column(logp, token))
        state = conditioning.advance(state, token)
    return torch.stack(best, dim=1)


def _certain_start(frames: Tensor) -> Tensor:
    """[R, T + 1], log probability of arriving at the empty prefix at frame 0 .. T: certain at frame 0. frames: any
    [R, T]."""
    return F.pad(torch.full_like(frames, -torch.inf), (1, 0), value=0.0)


def _forward(arrival_logp: Tensor, stay_logp: Tensor) -> Tensor:
    """[R, T + 1], log probability of being in a state after frames 1 .. t.

    arrival_logp: [R, T + 1], of arriving at each frame; stay_logp: [R, T], of staying in each frame.
    """
    at = [arrival_logp[:, 0]]
    for arrived, stayed in zip(arrival_logp[:, 1:].T, stay_logp.T, strict=True):
        at.append(torch.logaddexp(at[-1] + stayed, arrived))
    return torch.stack(at, dim=1)


def _arrival(before_logp: Tensor, emission: Tensor) -> Tensor:
    """[R, T + 1], log probability of arriving at each frame t.

    before_logp: [R, T + 1], of being in the state before after frame t - 1; emission: [R, T], of the label at t.
    """
    return F.pad(before_logp[:, :-1] + emission, (1, 0), value=-torch.inf)


def _children(before_logp: Tensor, scale_logp: Tensor, probability: Tensor) -> Tensor:
    """[R, C], the sum over t of before_{t-1} p_t(c), relative to the largest scale_{t-1}.

    before_logp, scale_logp: [R, T + 1]; probability: [R, T, C].
    """
    peak = scale_logp[:, :-1].amax(-1, keepdim=True).clamp(min=torch.finfo(scale_logp.dtype).min)
    return ((before_logp[:, :-1] - peak).exp()[:, None] @ probability)[:, 0]


def _most_probable(psi: Tensor) -> Tensor:
    """[R], argmax of psi [R, V]; -1 if all are 0, as after a prefix that fills all frames."""
    best = psi.max(-1)
    return best.indices.where(best.values > 0, -1)


def _column(values: Tensor, token: Tensor) -> Tensor:
    """[R, T]: the column `token` [R] of values [R, T, V + 1]."""
    return values.gather(2, token[:, None, None].expand(-1, values.shape[1], 1))[..., 0]
