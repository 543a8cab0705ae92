"""Key-value caches of softmax attention, [B, 2, S, H, d]: keys and values of S slots, a row's first ones filled."""

import torch.nn.functional as F
from torch import Tensor


def is_cache(layer: Tensor) -> bool:
    return layer.ndim == 5


def grow(cache: Tensor, needed: int) -> Tensor:
    """Return the cache with at least `needed` slots; capacity doubles so that appending stays cheap."""
    capacity = cache.shape[2]
    if needed <= capacity:
        return cache
    return resized(cache, max(needed, 2 * capacity, 64))


def resized(cache: Tensor, capacity: int) -> Tensor:
    """The cache with this many slots; a negative padding cuts."""
    return F.pad(cache, (0, 0, 0, 0, 0, capacity - cache.shape[2]))


def attend_cache(q: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of q [B, T, H, d] to a cache [B, 2, S, H, d] where `mask` [B, T, S] is True → [B, T, H, d]."""
    k, v = (x.transpose(1, 2).to(q.dtype) for x in cache.unbind(1))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None]).transpose(1, 2)
