"""Norms, activations, GLU, LRPE and the residual block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm.kernels.glu import glu_product
from tnllm.kernels.lrpe import lrpe
from tnllm.kernels.srms_norm import srms_norm
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.decay import initial_theta


class SRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), no parameters (arXiv 2307.14995 Eq. 8)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return srms_norm(x, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with its weight in x's dtype: a wider weight would lose the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm in x's dtype (statistics in fp32): autocast alone would run and return it in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), None, self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm the config names, over the last `width` channels. None of them has a bias."""
    if config.norm == "srmsnorm":
        return SRMSNorm(config.norm_eps)
    if config.norm == "rmsnorm":
        return RMSNorm(width, eps=config.norm_eps)
    return LayerNorm(width, eps=config.norm_eps, bias=False)


def activate(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "1+elu":
        return 1.0 + F.elu(x)
    if kind == "relu":
        return F.relu(x)
    return x


class GLU(nn.Module):
    """Channel mixer ((x W1) * (x W2)) W3; SGLU when there is no activation (arXiv 2307.14995 Eq. 5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.glu_activation
        self.l1 = nn.Linear(config.model_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.model_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.model_dim, bias=False)

    @property
    def fuses_up_projections(self) -> bool:
        """Whether training computes l1 and l2 as one product: on CUDA, unless a projection is wrapped (LoRA)."""
        return type(self.l1) is type(self.l2) is nn.Linear and self.l1.weight.is_cuda

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.fuses_up_projections:
            both = F.linear(x, torch.cat([self.l1.weight, self.l2.weight]))
            return self.l3(glu_product(both, self.activation == "silu"))
        return self.l3(activate(self.l1(x), self.activation) * self.l2(x))


class LRPE(nn.Module):
    """Linearized relative position encoding: x at position t becomes [x cos(theta t); x sin(theta t)].

    `theta` [H, 1, d] is trained, takes no weight decay, and stays fp32 whatever the model is cast to: rounded to
    bfloat16 it would be off by 4e-3 relative, hundreds of radians at position 100,000.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.theta = nn.Parameter(initial_theta(config))

    def _apply(self, fn: Any, recurse: bool = True) -> "LRPE":
        exact = self.theta.detach()
        super()._apply(fn, recurse)
        if self.theta.element_size() < 4:
            self.theta.data = exact.to(self.theta.device)
        return self

    def reset(self) -> None:
        """Set theta to its starting frequencies."""
        with torch.no_grad():
            self.theta.copy_(initial_theta(self.config))

    def forward(self, x: Tensor, positions: Tensor, activation: str) -> Tensor:
        """[B, T, H, d] and [B, T] int64 positions → [B, T, H, 2d]; the activation comes first."""
        if activation not in ("silu", "none"):
            x, activation = activate(x, activation), "none"
        return lrpe(x, self.theta, positions, None if activation == "none" else activation)


class ResidualBlock(nn.Module):
    """Pre-norm residual block: token mixer, then channel mixer."""

    def __init__(self, config: ModelConfig, token_mixer: nn.Module) -> None:
        super().__init__()
        self.token_norm = make_norm(config, config.model_dim)
        self.token_mixer = token_mixer
        self.channel_norm = make_norm(config, config.model_dim)
        self.channel_mixer = GLU(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, M] → x [B, T, M], and the layer's new state."""
        mixed, state = self.token_mixer(self.token_norm(x), positions, state, cu_seqlens, longest)
        x = x + mixed
        return x + self.channel_mixer(self.channel_norm(x)), state
