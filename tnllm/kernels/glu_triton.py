"""Triton kernels of the product inside a gated linear unit: one pass over memory forward, one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _NUM_WARPS = 1, 1024, 4


@triton.jit
def _glu_kernel(ab, y, num_rows, width, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = (row < num_rows) & (column < width)
    b_a = tl.load(ab + row * 2 * width + column, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(ab + row * 2 * width + width + column, mask=m, other=0.0).to(tl.float32)
    if SILU:
        b_a = b_a / (1.0 + tl.exp(-b_a))
    tl.store(y + row * width + column, (b_a * b_b).to(y.dtype.element_ty), mask=m)


@triton.jit
def _glu_backward_kernel(dy, ab, dab, num_rows, width, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = (row < num_rows) & (column < width)
    b_dy = tl.load(dy + row * width + column, mask=m, other=0.0).to(tl.float32)
    b_a = tl.load(ab + row * 2 * width + column, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(ab + row * 2 * width + width + column, mask=m, other=0.0).to(tl.float32)
    b_da = b_dy * b_b
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-b_a))
        b_da *= sigmoid * (1.0 + b_a * (1.0 - sigmoid))
        b_a *= sigmoid
    tl.store(dab + row * 2 * width + column, b_da.to(dab.dtype.element_ty), mask=m)
    tl.store(dab + row * 2 * width + width + column, (b_dy * b_a).to(dab.dtype.element_ty), mask=m)


def _launch(kernel, tensors: list[Tensor], silu: bool, width: int) -> None:
    num_rows = tensors[0].numel() // tensors[0].shape[-1]
    block = min(_COLUMNS, triton.next_power_of_2(width))
    grid = (triton.cdiv(num_rows, _ROWS), triton.cdiv(width, block))
    kernel[grid](*tensors, num_rows, width, SILU=silu, ROWS=_ROWS, BLOCK=block, num_warps=_NUM_WARPS)


def launch_forward(ab: Tensor, silu: bool) -> Tensor:
    """[..., 2F] → [..., F]."""
    ab = ab.contiguous()
    y = torch.empty(*ab.shape[:-1], ab.shape[-1] // 2, dtype=ab.dtype, device=ab.device)
    _launch(_glu_kernel, [ab, y], silu, y.shape[-1])
    return y


def launch_backward(dy: Tensor, ab: Tensor, silu: bool) -> Tensor:
    """The gradient of ab [..., 2F] from that of y [..., F]."""
    dy, ab = dy.contiguous(), ab.contiguous()
    dab = torch.empty(ab.shape, dtype=ab.dtype, device=ab.device)
    _launch(_glu_backward_kernel, [dy, ab, dab], silu, dy.shape[-1])
    return dab
