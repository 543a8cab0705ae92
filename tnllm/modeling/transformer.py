"""Softmax attention with rotary positions: the token mixer of the Llama-style baseline, and of a hybrid's Nth layers.

Its state is a key-value cache [B, 2, capacity, H, d]; row b holds position[b] tokens. It grows with the length.
"""

import math

import torch
from torch import Tensor, nn

from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.cache import attend_cache
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.layers import RMSNorm
from tnllm.modeling.softmax_attention import softmax_attention


class SoftmaxAttention(nn.Module):
    """Token mixer of one layer, with the interface of GatedLinearAttention."""

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
        turn, scale = rotary(self.config, x.device)
        q, k = (rotate(x, positions, turn, scale) for x in (q, k))
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
        attended, state = softmax_attention(*self.project(x, positions), positions, state, cu_seqlens, longest)
        return self.out_proj(attended.flatten(-2)), state

    def step(self, x: Tensor, positions: Tensor, state: Tensor) -> Tensor:
        """One token per row; the cache must have a free slot for it (`State.reserve`) and is updated in place."""
        q, k, v = self.project(x[:, None], positions[:, None])
        rows = torch.arange(len(x), device=x.device)
        state[rows, 0, positions] = k[:, 0].to(state.dtype)
        state[rows, 1, positions] = v[:, 0].to(state.dtype)
        mask = torch.arange(state.shape[2], device=x.device) <= positions[:, None]
        return self.out_proj(attend_cache(q, state, mask[:, None])[:, 0].flatten(-2))

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """An empty cache [B, 2, 0, H, d]."""
        config = self.config
        shape = (batch, 2, 0, config.num_heads, config.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)


def rotary(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians a position [d/2] fp32, and the factor of rotated queries and keys, 1 but for yarn."""
    half = config.head_dim // 2
    index = torch.arange(half, device=device, dtype=torch.float32)
    turn = config.rope_base ** (-index / half)
    # Of an exported hybrid the name is transformers' own, and means nothing here.
    if config.kind != "transformer" or config.rope_scaling == "none":
        return turn, 1.0
    scaled = turn / config.rope_factor
    if config.rope_scaling == "linear":
        return scaled, 1.0
    # Channels that turn over 32 times within the length of training keep their speed, those of less than one turn are
    # scaled, and those between are mixed.
    low, high = (
        half * math.log(config.rope_length / (turns * 2 * math.pi)) / math.log(config.rope_base) for turns in (32, 1)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
    share = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return scaled * share + turn * (1 - share), 0.1 * math.log(config.rope_factor) + 1


def rotate(x: Tensor, positions: Tensor, turn: Tensor, scale: float = 1.0) -> Tensor:
    """Rotary positions on [B, T, H, d] (pairs are channel i and i + d/2), angles in fp32; see `rotary`."""
    half = x.shape[-1] // 2
    angles = positions[..., None].float() * turn
    cos, sin = (scale * angles.cos())[:, :, None], (scale * angles.sin())[:, :, None]
    first, second = x.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def make_mixer(config: ModelConfig, layer: int) -> GatedLinearAttention | SoftmaxAttention:
    """The token mixer of a layer. The rest of the block is the same for both kinds."""
    return SoftmaxAttention(config) if config.is_softmax(layer) else GatedLinearAttention(config, layer)
