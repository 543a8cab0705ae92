"""SRMSNorm in Triton: each program holds full rows, so one pass reads x (and dy) and writes the result."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements per program: with 32 per thread of 8 warps, enough loads are in flight to saturate memory bandwidth.
_ELEMENTS = 8192
_NUM_WARPS = 8


@triton.jit
def _fwd_kernel(x, y, num_rows, width, stride_x, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    m = (row < num_rows) & (column < width)
    b_x = tl.load(x + row * stride_x + column, mask=m, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(b_x * b_x, 1) / width + eps)
    tl.store(y + row * width + column, (b_x * r[:, None]).to(y.dtype.element_ty), mask=m)


@triton.jit
def _bwd_kernel(dy, x, dx, num_rows, width, stride_dy, stride_x, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    m = (row < num_rows) & (column < width)
    b_x = tl.load(x + row * stride_x + column, mask=m, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + row * stride_dy + column, mask=m, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(b_x * b_x, 1) / width + eps)[:, None]
    b_y = b_x * r
    b_dx = r * (b_dy - b_y * (tl.sum(b_y * b_dy, 1) / width)[:, None])
    tl.store(dx + row * width + column, b_dx.to(dx.dtype.element_ty), mask=m)


def _rows(x: Tensor) -> Tensor:
    """[rows, M] with unit stride along M; a view if the strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _grid(num_rows: int, width: int) -> tuple[int, int, int]:
    """Number of programs, rows per program, padded width."""
    block = triton.next_power_of_2(width)
    rows = max(1, _ELEMENTS // block)
    return triton.cdiv(num_rows, rows), rows, block


def launch_forward(x: Tensor, eps: float) -> Tensor:
    """Forward on any [..., M]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = _rows(x)
    programs, rows, block = _grid(*flat.shape)
    if programs:
        _fwd_kernel[(programs,)](
            flat, y, *flat.shape, flat.stride(0), eps, ROWS=rows, BLOCK=block, num_warps=_NUM_WARPS
        )
    return y


def launch_backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    """Backward on any [..., M]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, grad = _rows(x), _rows(dy)
    programs, rows, block = _grid(*flat.shape)
    if programs:
        _bwd_kernel[(programs,)](
            grad, flat, dx, *flat.shape, grad.stride(0), flat.stride(0), eps, ROWS=rows, BLOCK=block,
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    return dx
