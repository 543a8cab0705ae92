"""SRMSNorm: op and Triton kernel against the definition in float64."""

import pytest
import torch
from torch.library import opcheck

from tnllm.kernels import srms_norm_triton as kernels
from tnllm.kernels.srms_norm import _backward, _forward, srms_norm, srms_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def exact(x, dy):
    """y and dx in float64 by autograd through the definition."""
    x = x.double().requires_grad_()
    y = srms_norm_reference(x, EPS)
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


# fp32 sums of up to 8192 squares; then the rounding of the result: 2^-9 and 2^-12 relative for bf16 and fp16. Triton's
# interpreter truncates to bf16 where hardware rounds, which doubles the error of a single element.
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4, torch.float64: 1e-14}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (5, 5120), (0, 16)])
def test_op(shape, dtype):
    x, dy = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    y = srms_norm(x, EPS)
    dx = torch.autograd.grad(y, x, dy)[0]
    assert y.dtype == dx.dtype == dtype and y.shape == dx.shape == x.shape
    if x.numel():
        expected = exact(x.detach(), dy)
        assert error(y.detach(), expected[0]) < LIMIT[dtype]
        # One channel leaves nothing of the gradient but eps: compare it absolutely.
        assert (dx.double() - expected[1]).norm() < LIMIT[dtype] * max(1.0, expected[1].norm())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 9, 96), (17, 1000), (2, 5120)])
def test_triton(shape, dtype):
    x, dy = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    y, dx = kernels.launch_forward(x, EPS), kernels.launch_backward(dy, x, EPS)
    expected = exact(x, dy)
    assert error(y, expected[0]) < LIMIT[dtype]
    assert (dx.double() - expected[1]).norm() < LIMIT[dtype] * max(1.0, expected[1].norm())


@pytest.mark.usefixtures("poisoned_memory")
def test_triton_reads_strides():
    wide = torch.randn(5, 3, 96, device=DEVICE)
    x, dy = wide[..., 32:64], torch.randn(3, 5, 32, device=DEVICE).transpose(0, 1)
    expected = exact(x, dy)
    assert error(kernels.launch_forward(x, EPS), expected[0]) < 1e-6
    assert error(kernels.launch_backward(dy, x, EPS), expected[1]) < 1e-6


def test_a_row_of_zeros_stays_zero():
    x = torch.zeros(2, 8, requires_grad=True)
    y = srms_norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8)) and torch.isfinite(x.grad).all()


def test_the_scale_of_a_row_does_not_matter():
    x = torch.randn(4, 64, dtype=torch.float64)
    torch.testing.assert_close(srms_norm(1000 * x), srms_norm(x), rtol=1e-5, atol=0)


def test_gradcheck_and_opcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(srms_norm, x)
    opcheck(_forward, (x, EPS))
    opcheck(_backward, (torch.randn(3, 5).double(), x.detach(), EPS))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 2560, 5120, 8192])
def test_large_on_gpu(width):
    x, dy = (torch.randn(4096, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    y = srms_norm(x)
    expected = exact(x.detach(), dy)
    assert error(y.detach(), expected[0]) < LIMIT[torch.bfloat16]
    assert error(torch.autograd.grad(y, x, dy)[0], expected[1]) < LIMIT[torch.bfloat16]
