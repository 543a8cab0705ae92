"""Causal softmax attention over rows, packed sequences and key-value caches.

o, cache = softmax_attention(q, k, v, positions, cache=None, cu_seqlens=None, longest=None)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.modeling.cache import attend_cache, grow
from tnllm.modeling.packing import packed_index, unpack_padded

# Of the mask of one call: a long chunk after a long cache would otherwise need more memory than the model.
_MASK_ELEMENTS = 1 << 24


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cache: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q, k, v [B, T, H, d] at `positions` [B, T] → o [B, T, H, d] and the cache with k and v, a new tensor.

    With cu_seqlens (B = 1) within each sequence, whose rows the cache holds. No packed sequence is longer than `longest`.
    """
    if cache is None:
        return _causal(q, k, v, cu_seqlens, longest), None
    if cu_seqlens is None:
        return _cached(q, k, v, positions, cache)
    # Packed rows are padded on the right; position -1 keeps padding out of the cache.
    longest = int(cu_seqlens.diff().max())
    sequence, offset = packed_index(cu_seqlens, q.shape[1])
    padded_positions = unpack_padded(positions[..., None], cu_seqlens, longest)[..., 0]
    filled = torch.arange(longest, device=q.device) < cu_seqlens.diff()[:, None]
    q, k, v = (unpack_padded(x, cu_seqlens, longest) for x in (q, k, v))
    attended, cache = _cached(q, k, v, padded_positions.masked_fill(~filled, -1), cache)
    return attended[sequence, offset][None], cache


def _causal(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, longest: int | None = None) -> Tensor:
    """Causal softmax attention over [B, T, H, d]; with cu_seqlens (B = 1) within each sequence."""
    if cu_seqlens is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        length = q.shape[1] if longest is None else longest
        out = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, length, length, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out[None]
    sequence, offset = packed_index(cu_seqlens, q.shape[1])
    mask = (sequence[:, None] == sequence) & (offset[:, None] >= offset)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _cached(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Append k, v [B, T, H, d] at `positions` [B, T] (-1: padding, dropped) to a copy of the cache and attend."""
    cache = grow(cache.clone(), int(positions.max()) + 1)
    row, column = (positions >= 0).nonzero(as_tuple=True)
    slots = positions[row, column]
    cache[row, 0, slots] = k[row, column].to(cache.dtype)
    cache[row, 1, slots] = v[row, column].to(cache.dtype)
    slots_of_keys, last = torch.arange(cache.shape[2], device=q.device), positions.clamp(min=0)[..., None]
    step = max(1, _MASK_ELEMENTS // (len(q) * cache.shape[2]))
    parts = zip(q.split(step, dim=1), last.split(step, dim=1), strict=True)
    return torch.cat([attend_cache(part, cache, slots_of_keys <= end) for part, end in parts], dim=1), cache
