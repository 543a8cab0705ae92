"""LRPE: linearized relative position encoding, fused with the activation before it.

    y = lrpe(x, theta, positions, activation="silu")      # [B, T, H, d] → [B, T, H, 2 d]

y = [a cos(theta t); a sin(theta t)] with a = activation(x), so that q and k encoded at t and s have the product
sum_j a_j b_j cos(theta_j (t - s)). Source: LRPE (arXiv 2307.09270); TNL (arXiv 2405.17381) Eq. 9; the layout (all
cosines, then all sines) is the released code's.

Angles reach 10^6 at a million tokens, where the spacing of fp32 numbers is 0.06. So theta * t is computed and reduced to
[-pi, pi] in float64; cos and sin are fp32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def lrpe_reference(x: Tensor, theta: Tensor, positions: Tensor, activation: str | None = None) -> Tensor:
    """The definition, with angles in float64."""
    a = F.silu(x) if activation == "silu" else x
    angle = positions[:, :, None, None].double() * theta[:, 0].double()
    return torch.cat([a * angle.cos().to(a.dtype), a * angle.sin().to(a.dtype)], dim=-1)


def lrpe(x: Tensor, theta: Tensor, positions: Tensor, activation: str | None = None) -> Tensor:
    """Encode x at integer positions.

    x [B, T, H, d] floating, any strides; theta [H, 1, d] fp32 (or float64); positions [B, T] int64; activation
    "silu" or None. Returns [B, T, H, 2 d] in x's dtype. Differentiable in x and theta.
    Raises ValueError for an unknown activation, or shapes and dtypes that do not fit.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}; allowed: 'silu', None")
    if x.dim() != 4 or theta.shape != (x.shape[2], 1, x.shape[3]) or positions.shape != x.shape[:2]:
        raise ValueError(
            "lrpe needs x [B, T, H, d], theta [H, 1, d], positions [B, T]; "
            f"got {list(x.shape)}, {list(theta.shape)}, {list(positions.shape)}"
        )
    if positions.dtype != torch.int64 or theta.dtype not in (torch.float32, torch.float64) or not x.is_floating_point():
        raise ValueError(
            "lrpe needs floating x, theta in float32 or float64 and int64 positions; "
            f"got {x.dtype}, {theta.dtype}, {positions.dtype}"
        )
    return _forward(x, theta, positions, activation == "silu")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cos_sin(theta: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of theta * t, [B, T, H, d]."""
    angle = positions[:, :, None, None].double() * theta[:, 0].double()
    angle = torch.remainder(angle + math.pi, 2 * math.pi).sub_(math.pi).to(dtype)
    return angle.cos(), angle.sin_()


@torch.library.custom_op("tnllm::lrpe", mutates_args=())
def _forward(x: Tensor, theta: Tensor, positions: Tensor, silu: bool) -> Tensor:
    if x.is_cuda:
        from tnllm.kernels.lrpe_triton import launch_forward

        return launch_forward(x, theta, positions, silu)
    a = F.silu(_wide(x)) if silu else _wide(x)
    cos, sin = _cos_sin(theta, positions, a.dtype)
    return torch.cat([a * cos, a * sin], dim=-1).to(x.dtype)


@_forward.register_fake
def _(x: Tensor, theta: Tensor, positions: Tensor, silu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])


@torch.library.custom_op("tnllm::lrpe_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, theta: Tensor, positions: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        from tnllm.kernels.lrpe_triton import launch_backward

        return launch_backward(dy, x, theta, positions, silu)
    wide = _wide(x)
    sigmoid = torch.sigmoid(wide)
    a = wide * sigmoid if silu else wide
    cos, sin = _cos_sin(theta, positions, a.dtype)
    dcos, dsin = _wide(dy).chunk(2, dim=-1)
    da = dcos * cos + dsin * sin
    dangle = a * (dsin * cos - dcos * sin)
    dtheta = torch.einsum("bt,bthd->hd", positions.to(a.dtype), dangle)[:, None]
    if silu:
        da = da * (sigmoid * (1 + wide * (1 - sigmoid)))
    return da.to(x.dtype).contiguous(), dtheta.to(theta.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, theta: Tensor, positions: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), theta.new_empty(theta.shape)


def _save(ctx, inputs, output) -> None:
    x, theta, positions, ctx.silu = inputs
    ctx.save_for_backward(x, theta, positions)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dx, dtheta = _backward(dy, *ctx.saved_tensors, ctx.silu)
    return dx, dtheta, None, None


_forward.register_autograd(_autograd, setup_context=_save)
