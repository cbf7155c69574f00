"""The call that stands in for a written-out softmax(QKᵀ)V."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NOTHING = -1e9  # a score this low weighs nothing beside any real one, and rounding makes all of a hidden row equal


def attend(
    query: Tensor,
    keys: Tensor,
    value: Tensor,
    mask: Tensor | None,
    fill: float | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """``softmax(query @ keys * scale + mask) @ value`` without the scores, as ``dtype``.

    Operands are [B, H, N, E] or [B, N, E], keys with their last two dimensions the other way round. With a ``fill``, the
    mask is boolean, and where it is True the scores are that low number instead. A row that is hidden as a whole is
    uniform, as rounding makes it in eager, and tells query and keys nothing; fused kernels lose its sum to rounding.
    """
    flat = query.dim() == 3
    query, key, value = (t.unsqueeze(0) if flat else t for t in (query, keys.transpose(-2, -1), value))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        hidden = mask <= NOTHING if fill is None else mask
        whole = hidden.all(-1, keepdim=True)
        query = query.masked_fill(whole, 0)
        mask = (mask if fill is None else query.new_zeros(mask.shape).masked_fill(mask, fill)).masked_fill(whole, 0)
        mask = mask.to(query.dtype).expand(-1, -1, query.shape[-2], key.shape[-2])
    out = scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return (out.squeeze(0) if flat else out).to(dtype).contiguous()
