"""Tree attention over a paged context and a dense masked tail, in plain PyTorch.

Letters: R requests, Q query rows per request, H query heads, K key-value heads, D head size, L context length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tail_bias(context_lens: Tensor, max_context: int, tail_allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [R, Q, L + Q]: 0 where a row may look, -inf elsewhere.

    context_lens: [R] int64, every row sees the whole context of its request; tail_allowed: [R, Q, Q] bool,
    which of the step's own rows each row sees (its ancestors and itself).
    """
    num_requests, num_rows, _ = tail_allowed.shape
    columns = torch.arange(max_context, device=context_lens.device)
    context_allowed = (columns[None, :] < context_lens[:, None])[:, None, :].expand(-1, num_rows, -1)
    allowed = torch.cat((context_allowed, tail_allowed), dim=-1)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=context_lens.device)
    return bias.masked_fill_(~allowed, float("-inf"))


def unpack_ancestor_masks(masks: Tensor, num_rows: int) -> Tensor:
    """[R, Q] int64 bitmasks (bit j: row sees row j) -> [R, Q, Q] bool."""
    bits = torch.arange(num_rows, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool()


def attend_with_bias(
    query: Tensor, context_key: Tensor, context_value: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Attention of query [R, Q, H, D] to context [R, K, L, D] and own rows [R, Q, K, D]; returns like query.

    bias: [R, Q, L + Q] from `tail_bias`. Grouped heads are folded into the rows, so that keys are never repeated.
    """
    num_requests, num_rows, num_heads, head_size = query.shape
    num_kv_heads = context_key.shape[1]
    group = num_heads // num_kv_heads
    keys = torch.cat((context_key, key.transpose(1, 2)), dim=2)
    values = torch.cat((context_value, value.transpose(1, 2)), dim=2)
    folded = query.view(num_requests, num_rows, num_kv_heads, group, head_size).permute(0, 2, 1, 3, 4)
    folded = folded.reshape(num_requests, num_kv_heads, num_rows * group, head_size)
    mask = bias.repeat_interleave(group, dim=1)[:, None]
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    out = out.view(num_requests, num_kv_heads, num_rows, group, head_size).permute(0, 2, 1, 3, 4)
    return out.reshape(num_requests, num_rows, num_heads, head_size)
