"""The gated product: its Triton launches against the definition in float64; the op itself on a GPU."""

import pytest
import torch
from torch.library import opcheck

from tnllm.kernels.glu import _forward, glu_product, glu_product_reference

fused = pytest.importorskip("tnllm.kernels.glu_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding of the result; Triton's interpreter truncates to bf16, which is twice that.
LIMIT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


def error(found, expected):
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 34), (7, 2600)])
def test_triton(shape, dtype, silu):
    ab, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    wide = ab.double().requires_grad_()
    expected = glu_product_reference(wide, silu)
    (gradient,) = torch.autograd.grad(expected, wide, dy.double())
    assert error(fused.launch_forward(ab.to(DEVICE), silu), expected.detach()) < LIMIT[dtype]
    assert error(fused.launch_backward(dy.to(DEVICE), ab.to(DEVICE), silu), gradient) < LIMIT[dtype]


def test_on_cpu_it_is_the_definition():
    ab = torch.randn(3, 8)
    assert torch.equal(glu_product(ab, True), torch.nn.functional.silu(ab[:, :4]) * ab[:, 4:])


def test_one_half_alone_is_refused():
    with pytest.raises(ValueError, match=r"must be even.*\[3, 5\]"):
        glu_product(torch.randn(3, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("silu", [False, True])
def test_op(silu):
    ab = torch.randn(2, 5, 34, device="cuda", requires_grad=True)
    opcheck(_forward, (ab, silu))
