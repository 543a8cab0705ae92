"""Softmax attention with rotary positions: the token mixer of the Llama-style baseline.

Its state is a key-value cache [2, B, capacity, H, d]; row b holds position[b] tokens. It grows with the length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm.modeling.config import ModelConfig
from tnllm.modeling.layers import RMSNorm
from tnllm.modeling.packing import packed_index, unpack_padded


class SoftmaxAttention(nn.Module):
    """Token mixer of one layer of the baseline, with the interface of GatedLinearAttention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(config.model_dim, 3 * config.model_dim, bias=False)
        self.out_proj = nn.Linear(config.model_dim, config.model_dim, bias=False)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.key_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, M], positions [B, T] → q, k, v [B, T, H, d]; q and k normalised if the config says so, and rotated."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, -1, self.config.head_dim)).unbind(-3)
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = (rotate(x, positions, self.config.rope_base) for x in (q, k))
        return q, k, v

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, M], positions [B, T] → y [B, T, M], cache. Without a state this is plain causal attention.

        `longest` bounds the packed sequences: the fused kernel launches as many blocks per sequence as the bound needs.
        """
        q, k, v = self.project(x, positions)
        if state is None:
            return self.out_proj(_causal(q, k, v, cu_seqlens, longest).flatten(-2)), None
        if cu_seqlens is None:
            attended, state = _cached(q, k, v, positions, state)
        else:
            # Packed rows are padded on the right; position -1 keeps padding out of the cache.
            longest = int(cu_seqlens.diff().max())
            sequence, offset = packed_index(cu_seqlens, x.shape[1])
            q, k, v = (unpack_padded(x, cu_seqlens, longest) for x in (q, k, v))
            padded_positions = unpack_padded(positions[..., None], cu_seqlens, longest)[..., 0]
            filled = torch.arange(longest, device=x.device) < cu_seqlens.diff()[:, None]
            attended, state = _cached(q, k, v, padded_positions.masked_fill(~filled, -1), state)
            attended = attended[sequence, offset][None]
        return self.out_proj(attended.flatten(-2)), state

    def step(self, x: Tensor, positions: Tensor, state: Tensor) -> Tensor:
        """One token per row; the cache must have a free slot for it (`grow`) and is updated in place."""
        q, k, v = self.project(x[:, None], positions[:, None])
        rows = torch.arange(len(x), device=x.device)
        state[0, rows, positions] = k[:, 0].to(state.dtype)
        state[1, rows, positions] = v[:, 0].to(state.dtype)
        return self.out_proj(_attend(q, state, positions[:, None])[:, 0].flatten(-2))

    def new_state(self, batch: int, device: torch.device) -> Tensor:
        """An empty cache [2, B, 0, H, d]."""
        config = self.config
        shape = (2, batch, 0, config.num_heads, config.head_dim)
        return torch.zeros(shape, dtype=self.out_proj.weight.dtype, device=device)


def grow(cache: Tensor, needed: int) -> Tensor:
    """Return the cache with at least `needed` slots; capacity doubles so that appending stays cheap."""
    capacity = cache.shape[2]
    if needed <= capacity:
        return cache
    added = max(needed, 2 * capacity, 64) - capacity
    return F.pad(cache, (0, 0, 0, 0, 0, added))


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions on [B, T, H, d] (pairs are channel i and i + d/2), angles in fp32."""
    half = x.shape[-1] // 2
    index = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = positions[..., None].float() * base ** (-index / half)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    first, second = x.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


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
    cache[0, row, slots] = k[row, column].to(cache.dtype)
    cache[1, row, slots] = v[row, column].to(cache.dtype)
    return _attend(q, cache, positions), cache


def _attend(q: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    """Attend from q [B, T, H, d] at `positions` [B, T] to every cached token up to that position."""
    slots = torch.arange(cache.shape[2], device=q.device)
    mask = slots <= positions.clamp(min=0)[..., None]
    k, v = (x.transpose(1, 2).to(q.dtype) for x in cache)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask[:, None]).transpose(1, 2)
