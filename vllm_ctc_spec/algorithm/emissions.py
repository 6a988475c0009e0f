"""From frame logits to the probabilities of a few candidate tokens: what the tree builder reads.

Two families of emission, both over V tokens and a blank, which is column V of the logits:

* independent: p_t(c), plain CTC (Graves et al. 2006, section 3.1): repeats merge, blanks drop;
* conditioned: p_t(c | u) = softmax_c(frame_t[c] + A[u] . B[c]), u the last emitted token, at the root the
  anchor: one label per frame, the rest blank, nothing merges. A drafter trained with
  cross-entropy per position is the case where blank has probability zero (logit -inf), and independent
  positions are the case where A is zero as well, so neither needs a tree builder of its own.

Everything has a fixed shape and nothing waits for the device, so the functions can be captured in a graph.

Letters: R requests, T frames, V vocabulary without blank, C candidates, K of any labels, r rank of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_NORMALISER_MAX_VOCABULARY = 2048
"""Above this vocabulary the normaliser of the conditioned family biases NORMALISER_SUPPORT tokens only."""

NORMALISER_SUPPORT = 512

CANDIDATE_POOL = 128
"""Tokens among which the conditioned family looks for its candidates by their probability given each other."""

# Bias values held at once: about one request in a CPU's cache, about 256 MB on a GPU.
_CPU_CHUNK_ELEMENTS = 1 << 19
_GPU_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class IndependentEmissions:
    """Log probabilities of C distinct candidate tokens in each frame; normalised over all V + 1 labels."""

    tokens: Tensor
    """[R, C] int64, distinct within a request."""
    token_logp: Tensor
    """[R, T, C] float32, log p_t(c)."""
    blank_logp: Tensor
    """[R, T] float32, log p_t(blank)."""


@dataclass(frozen=True)
class ConditionedEmissions:
    """Log probabilities of C distinct candidate tokens in each frame, given the last emitted token u."""

    tokens: Tensor
    """[R, C] int64, distinct within a request."""
    root_logp: Tensor
    """[R, T, C] float32, log p_t(c | anchor): nothing has been emitted yet."""
    root_blank_logp: Tensor
    """[R, T] float32, log p_t(blank | anchor)."""
    pair_logp: Tensor
    """[R, T, C, C] float32, log p_t(c | u): u is the candidate of index 2, c that of the last index."""
    pair_blank_logp: Tensor
    """[R, T, C] float32, log p_t(blank | u)."""


def independent_emissions(logits: Tensor, num_candidates: int) -> IndependentEmissions:
    """Emissions of the min(V, num_candidates) tokens with the largest probability in any one frame.

    logits: [R, T, V + 1], any floating type, blank last; -inf is allowed, a frame of nothing else is not.
    Raises ValueError if the shape or num_candidates is unusable.
    """
    _check(logits, num_candidates)
    logp = logits.float().log_softmax(-1)
    tokens = _top_tokens(logp, num_candidates)
    return IndependentEmissions(tokens, _columns(logp, tokens), logp[..., -1])


def conditioned_emissions(
    logits: Tensor, anchors: Tensor, condition_last: Tensor, condition_next: Tensor, num_candidates: int
) -> ConditionedEmissions:
    """Emissions of min(V, num_candidates) candidates, each given the anchor and given every other candidate.

    Candidates are the tokens most probable to be emitted in any one frame, whatever was emitted before, within
    a pool of CANDIDATE_POOL tokens that are probable without bias (in the first frame: given the anchor).

    The normaliser is exact over all V + 1 labels up to a vocabulary of EXACT_NORMALISER_MAX_VOCABULARY. Above, it
    sums the NORMALISER_SUPPORT best tokens and blank with their bias and all other labels without it: wrong by
    as much as u's bias would move mass to or from those others.

    logits: [R, T, V + 1], blank last. anchors: [R] int64. condition_last: [V, r], the table A.
    condition_next: [V + 1, r], the table B, blank last. Any floating type, the tables of one; the results are
    float32, only the bias over the full vocabulary is a product in the tables' own type.
    Raises ValueError if shapes disagree or num_candidates is unusable.
    """
    _check(logits, num_candidates)
    num_labels = logits.shape[-1]
    if condition_last.shape[0] != num_labels - 1 or condition_next.shape[0] != num_labels:
        raise ValueError(
            f"condition tables of {condition_last.shape[0]} and {condition_next.shape[0]} rows for logits over "
            f"{num_labels} labels: the first needs one row per token, the second one more for blank."
        )
    frames = logits.float()
    frames_logp = frames.log_softmax(-1)
    root_bias = (condition_last[anchors] @ condition_next.T).float()
    root_logp = (frames + root_bias[:, None]).log_softmax(-1)
    best = torch.cat([root_logp[:, :1], frames_logp[:, 1:]], dim=1)
    pool = _top_tokens(best, max(CANDIDATE_POOL, num_candidates))
    tokens = _most_emitted(pool, frames_logp, anchors, condition_last, condition_next, num_candidates)

    last = condition_last[tokens]
    labels = _with_blank(tokens, num_labels)
    scores = _columns(frames_logp, labels)[:, :, None] + (last.float() @ condition_next[labels].float().mT)[:, None]
    if num_labels - 1 <= EXACT_NORMALISER_MAX_VOCABULARY:
        total = _normaliser(frames_logp, last, condition_next.expand(len(last), -1, -1))
    else:
        support = _with_blank(_top_tokens(best, max(NORMALISER_SUPPORT, num_candidates)), num_labels)
        outside = frames_logp.scatter(2, _per_frame(support, frames_logp), -torch.inf).logsumexp(-1, keepdim=True)
        total = torch.logaddexp(outside, _normaliser(_columns(frames_logp, support), last, condition_next[support]))
    # The product's two factors are scaled apart, so it may underflow where the candidates' own sum does not.
    total = torch.maximum(total, scores.logsumexp(-1))
    pair_logp = scores - total[..., None]
    return ConditionedEmissions(
        tokens,
        _columns(root_logp, tokens),
        root_logp[..., -1],
        pair_logp[..., :-1],
        pair_logp[..., -1],
    )


def _check(logits: Tensor, num_candidates: int) -> None:
    if logits.dim() != 3 or logits.shape[-1] < 2:
        raise ValueError(f"frame logits of shape {tuple(logits.shape)}: needs [requests, frames, tokens + blank].")
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}: needs at least one candidate token.")


def _top_tokens(logp: Tensor, num_candidates: int) -> Tensor:
    """[R, C] tokens by their largest value over the frames of logp [R, T, V + 1]."""
    best = logp[..., :-1].amax(1)
    return best.topk(min(best.shape[-1], num_candidates), dim=-1).indices


def _with_blank(tokens: Tensor, num_labels: int) -> Tensor:
    """[R, K + 1]: tokens [R, K], then blank."""
    return F.pad(tokens, (0, 1), value=num_labels - 1)


def _per_frame(labels: Tensor, values: Tensor) -> Tensor:
    """[R, T, K]: labels [R, K] repeated for each frame of values [R, T, V + 1]."""
    return labels[:, None].expand(-1, values.shape[1], -1)


def _columns(values: Tensor, labels: Tensor) -> Tensor:
    """[R, T, K]: the columns `labels` [R, K] of values [R, T, V + 1]."""
    return values.gather(2, _per_frame(labels, values))


def _most_emitted(
    pool: Tensor, frames_logp: Tensor, anchors: Tensor, condition_last: Tensor, condition_next: Tensor, num: int
) -> Tensor:
    """[R, C]: the `num` tokens of pool [R, S] most probable to be emitted in any one frame."""
    if pool.shape[1] <= num:
        return pool
    labels = _with_blank(pool, condition_next.shape[0])
    last = condition_last[torch.cat([pool, anchors[:, None]], dim=1)]
    emitted = _emitted(_columns(frames_logp, labels).exp(), (last @ condition_next[labels].mT).float())
    return pool.gather(1, emitted.amax(1).topk(num, dim=1).indices)


def _emitted(frames: Tensor, bias: Tensor) -> Tensor:
    """[R, T, S] probability that frame t emits token c, summed over everything emitted before.

    The forward recursion over the last emitted token, which is all that a frame depends on. It only ranks
    candidates, so what lies outside the S tokens takes part in the normaliser, unbiased, and is then forgotten.

    frames: [R, T, S + 1] probabilities, blank last, of which the rest to 1 is outside.
    bias: [R, S + 1, S + 1], last token (the anchor at the end) by next label (blank at the end).
    """
    peak = bias.amax(-1, keepdim=True).clamp_(min=0.0)
    weight = bias.sub_(peak).exp_()
    outside = (1 - frames.sum(-1, keepdim=True)).clamp_(min=0.0)
    total = (frames @ weight.mT).add_(outside * (-peak).exp().mT).clamp_(min=1e-30)
    stays = weight[:, None, :, -1] * frames[..., -1:] / total
    last = torch.zeros_like(total[:, :1])
    last[..., -1] = 1.0
    emitted = []
    for t in range(frames.shape[1]):
        now = slice(t, t + 1)
        emitted.append((last / total[:, now] @ weight * frames[:, now])[..., :-1])
        last = F.pad(emitted[-1], (0, 1)).addcmul_(last, stays[:, now])
    return torch.cat(emitted, dim=1)


def _normaliser(frames_logp: Tensor, last: Tensor, table: Tensor) -> Tensor:
    """[R, T, C] log sum over S labels of exp(frames_logp + bias), as one product exp(frames) exp(bias)^T.

    frames_logp: [R, T, S]. last: [R, C, r], rows of A. table: [R, S, r], rows of B.
    """
    frames = frames_logp.exp()
    num_requests, num_candidates = last.shape[:2]
    limit = _CPU_CHUNK_ELEMENTS if table.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    step = max(1, limit // (num_candidates * table.shape[1]))
    parts = []
    for start in range(0, num_requests, step):
        chunk = slice(start, start + step)
        bias = (table[chunk] @ last[chunk].mT).float()
        peak = bias.amax(1, keepdim=True)
        parts.append((frames[chunk] @ bias.sub_(peak).exp_()).log() + peak)
    return torch.cat(parts)
