"""LRPE with its activation in Triton: angles in float64 registers, one read and one write of memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens per program in the backward pass; each program stores one partial sum of theta's gradient.
_TOKENS = 32


@triton.jit
def _encode(x, theta, position, o_d, m_d, head, DIM: tl.constexpr, SILU: tl.constexpr):
    """A row of x in fp32, its sigmoid, its activation, and cos and sin of its angles."""
    b_x = tl.load(x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_theta = tl.load(theta + head * DIM + o_d, mask=m_d, other=0.0).to(tl.float64)
    turns = b_theta * position.to(tl.float64) * 0.15915494309189535
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-b_x))
    a = b_x * sigmoid if SILU else b_x
    return b_x, sigmoid, a, tl.cos(angle), tl.sin(angle)


@triton.jit
def _fwd_kernel(
    x, theta, positions, y, T,
    s_b, s_t, s_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < DIM
    p_x = x + (row // T) * s_b + (row % T) * s_t + head * s_h
    _, _, a, cos, sin = _encode(p_x, theta, tl.load(positions + row), o_d, m_d, head, DIM, SILU)
    p_y = y + (row * HEADS + head) * 2 * DIM + o_d
    tl.store(p_y, (a * cos).to(y.dtype.element_ty), mask=m_d)
    tl.store(p_y + DIM, (a * sin).to(y.dtype.element_ty), mask=m_d)


@triton.jit
def _bwd_kernel(
    dy, x, theta, positions, dx, partial, rows, T, s_b, s_t, s_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0).to(tl.int64) * TOKENS, tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < DIM
    # In float64: positions reach 10^6 and terms of both signs cancel.
    dtheta = tl.zeros([BLOCK], tl.float64)
    for i in range(TOKENS):
        row = first + i
        if row < rows:
            position = tl.load(positions + row)
            p_x = x + (row // T) * s_b + (row % T) * s_t + head * s_h
            b_x, sigmoid, a, cos, sin = _encode(p_x, theta, position, o_d, m_d, head, DIM, SILU)
            p_dy = dy + (row * HEADS + head) * 2 * DIM + o_d
            dcos = tl.load(p_dy, mask=m_d, other=0.0).to(tl.float32)
            dsin = tl.load(p_dy + DIM, mask=m_d, other=0.0).to(tl.float32)
            da = dcos * cos + dsin * sin
            if SILU:
                da = da * (sigmoid * (1.0 + b_x * (1.0 - sigmoid)))
            tl.store(dx + (row * HEADS + head) * DIM + o_d, da.to(dx.dtype.element_ty), mask=m_d)
            dtheta += position.to(tl.float64) * (a * (dsin * cos - dcos * sin)).to(tl.float64)
    tl.store(partial + (tl.program_id(0).to(tl.int64) * HEADS + head) * DIM + o_d, dtheta, mask=m_d)


def launch_forward(x: Tensor, theta: Tensor, positions: Tensor, silu: bool) -> Tensor:
    """One program per token and head; shapes as in `lrpe`."""
    B, T, H, D = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty(B, T, H, 2 * D, dtype=x.dtype, device=x.device)
    sizes = {"HEADS": H, "DIM": D, "BLOCK": triton.next_power_of_2(D), "SILU": silu}
    _fwd_kernel[(B * T, H)](
        x, theta.contiguous(), positions.contiguous(), y, T, x.stride(0), x.stride(1), x.stride(2), **sizes, num_warps=1
    )
    return y


def launch_backward(dy: Tensor, x: Tensor, theta: Tensor, positions: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """dx [B, T, H, d] and dtheta [H, 1, d]."""
    B, T, H, D = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    dx = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(B * T, _TOKENS)
    partial = torch.empty(programs, H, 1, D, dtype=torch.float64, device=x.device)
    sizes = {"HEADS": H, "DIM": D, "BLOCK": triton.next_power_of_2(D), "SILU": silu, "TOKENS": _TOKENS}
    _bwd_kernel[(programs, H)](
        dy.contiguous(), x, theta.contiguous(), positions.contiguous(), dx, partial, B * T, T,
        x.stride(0), x.stride(1), x.stride(2), **sizes, num_warps=1,
    )  # fmt: skip
    return dx, partial.sum(0).to(theta.dtype)
