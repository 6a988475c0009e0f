"""Tree attention over a paged context and a dense masked tail, in plain PyTorch.

Letters: R requests, Q query rows per request, H query heads, K key-value heads, G = H / K, D head size, L context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tail_bias(context_lens: Tensor, max_context: int, tail_allowed: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [R, 1, Q * G, L + Q]: 0 where a row may look, -inf elsewhere; made once for all layers.

    context_lens: [R] int64, every row sees the whole context of its request; tail_allowed: [R, Q, Q] bool,
    which of the step's own rows each row sees (its ancestors and itself).
    """
    num_rows = tail_allowed.shape[1]
    columns = torch.arange(max_context, device=context_lens.device)
    context_allowed = (columns[None, :] < context_lens[:, None])[:, None, :].expand(-1, num_rows, -1)
    allowed = torch.cat((context_allowed, tail_allowed), dim=-1).repeat_interleave(group, dim=1)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=context_lens.device)
    return bias.masked_fill_(~allowed, float("-inf"))[:, None]


def unpack_ancestor_masks(masks: Tensor, num_rows: int) -> Tensor:
    """[R, Q] int64 bitmasks (bit j: row sees row j) -> [R, Q, Q] bool."""
    bits = torch.arange(num_rows, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool()


def attend_with_bias(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of query [R, Q, H, D] to keys and values [R, K, L + Q, D]; returns like query.

    bias: from `tail_bias`. Grouped heads are folded into the rows, so that keys are never repeated.
    """
    num_rows, num_kv_heads = query.shape[1], keys.shape[1]
    folded = query.unflatten(2, (num_kv_heads, -1)).transpose(1, 2).flatten(2, 3)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias, scale=scale)
    return out.unflatten(2, (num_rows, -1)).transpose(1, 2).flatten(2, 3)
