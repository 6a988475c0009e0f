"""What a program of the tree-attention kernel does with one tile of keys and values, and which tiles it reads."""

# Triton reads the kernels' annotations as types of its own, so they cannot be typed for mypy.
# mypy: disable-error-code=no-untyped-def

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_seen(context_len, WINDOW: tl.constexpr):
    """Of the context, the first position that any row of the request sees."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context_len + 1 - WINDOW, 0)
    return first


@triton.jit
def tiles_of_split(context_len, num_splits, MIN_TILES: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """First context tile that is read, number of context tiles, and number of tiles per split.

    The step's own keys are one tile after the context.
    """
    first = first_seen(context_len, WINDOW) // BLOCK_N
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    return first, num_tiles, tl.maximum(tl.cdiv(num_tiles - first + 1, num_splits), MIN_TILES)


@triton.jit
def count_bits(mask):
    """Number of ones of int64 (Warren, Hacker's Delight, section 5-1)."""
    mask -= (mask >> 1) & 0x5555555555555555
    mask = (mask & 0x3333333333333333) + ((mask >> 2) & 0x3333333333333333)
    mask = (mask + (mask >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (mask * 0x0101010101010101) >> 56


@triton.jit
def attend_tile(query, keys, values, allowed, scale, soft_cap, top, total, acc, HAS_SOFT_CAP: tl.constexpr):
    """One tile of the online softmax, in base 2. top, total: [rows] largest logit and sum of weights so far."""
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if HAS_SOFT_CAP:
        logits = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * logits / soft_cap) + 1.0))
    logits = tl.where(allowed, logits * LOG2_E, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    # While a row has seen no key, -inf - -inf would be NaN.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(top - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def as_cached(tile, scale_ptr, like, element: tl.constexpr, FP8_MAX: tl.constexpr):
    """A tile as a float8 cache will store it, as vLLM does: divide, saturate, round."""
    scaled = tile.to(tl.float32) / tl.load(scale_ptr)
    return tl.clamp(scaled, -FP8_MAX, FP8_MAX).to(element).to(like.dtype)
