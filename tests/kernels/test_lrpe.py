"""LRPE: the relative kernel it stands for, its angles far out, and the Triton kernel against the definition."""

import pytest
import torch
from torch.library import opcheck

from tnllm.kernels import lrpe_triton as kernels
from tnllm.kernels.lrpe import _backward, _forward, lrpe, lrpe_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def theta_of(heads, dim):
    count = heads * dim
    return torch.tensor([10_000.0 ** (-2 * j / count) for j in range(count)]).view(heads, 1, dim)


def inputs(batch, length, heads, dim, dtype=torch.float32, start=0):
    x = torch.randn(batch, length, heads, dim).to(dtype)
    positions = start + torch.arange(length).expand(batch, length) + 7 * torch.arange(batch)[:, None]
    return x, theta_of(heads, dim), positions


def exact(x, theta, positions, activation, dy):
    x, theta = x.double().requires_grad_(), theta.double().requires_grad_()
    y = lrpe_reference(x, theta, positions, activation)
    return (y.detach(), *torch.autograd.grad(y, (x, theta), dy.double()))


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("start", [0, 100_000])
def test_products_depend_on_the_distance_alone(start):
    q, theta, positions = inputs(1, 12, 2, 8, torch.float64, start)
    k = torch.randn_like(q)
    scores = torch.einsum("bihd,bjhd->bhij", lrpe(q, theta, positions), lrpe(k, theta, positions))
    gap = (positions[0, :, None] - positions[0, None]).double()
    kernel = torch.cos(gap[..., None, None] * theta[:, 0].double())
    expected = torch.einsum("bihd,bjhd,ijhd->bhij", q, k, kernel)
    torch.testing.assert_close(scores, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("position", "limit"), [(2048, 1e-6), (100_000, 1e-6), (1_000_000, 1e-6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_hold_far_out(position, limit, dtype):
    """fp32 angles would be off by 4e-3 rad at 100,000 and by 3e-2 at a million; these are reduced in float64."""
    x = torch.ones(1, 1, 4, 16, dtype=dtype)
    theta = theta_of(4, 16)
    y = lrpe(x.float(), theta, torch.tensor([[position]])).double()
    angle = theta[:, 0].double() * position
    found = torch.atan2(y[0, 0, :, 16:], y[0, 0, :, :16])
    off = torch.remainder(found - angle + torch.pi, 2 * torch.pi) - torch.pi
    assert off.abs().max() < limit
    # bfloat16 inputs see the same angles: their result is the fp32 one, rounded.
    assert torch.equal(lrpe(x, theta, torch.tensor([[position]])), y.to(dtype))


# The result is rounded once: 2^-9 and 2^-12 relative; fp32 keeps 1e-7 in cos, sin and products. Triton's interpreter
# truncates to bf16 where hardware rounds, which doubles the error of a single element.
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 5e-4}
# theta's gradient sums terms as large as the position, of both signs: cancellation costs digits.
THETA_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 17, 2, 24), (1, 33, 1, 128)])
@pytest.mark.parametrize("form", ["op", "triton"])
@pytest.mark.usefixtures("poisoned_memory")
def test_against_float64(form, shape, dtype, activation):
    x, theta, positions = inputs(*shape, dtype, start=50)
    dy = torch.randn(*shape[:3], 2 * shape[3]).to(dtype)
    silu = activation == "silu"
    if form == "op":
        x.requires_grad_()
        theta.requires_grad_()
        y = lrpe(x, theta, positions, activation)
        found = (y.detach(), *torch.autograd.grad(y, (x, theta), dy))
        x, theta = x.detach(), theta.detach()
    else:
        given = [part.to(DEVICE) for part in (x, theta, positions)]
        found = (kernels.launch_forward(*given, silu), *kernels.launch_backward(dy.to(DEVICE), *given, silu))
    expected = exact(x, theta, positions, activation, dy)
    limits = (LIMIT[dtype], LIMIT[dtype], THETA_LIMIT[dtype])
    for name, a, b, limit in zip(("y", "dx", "dtheta"), found, expected, limits, strict=True):
        assert error(a.cpu(), b) < limit, name


@pytest.mark.usefixtures("poisoned_memory")
def test_triton_reads_the_fused_projection_in_place():
    fused = torch.randn(2, 9, 4 * 32, device=DEVICE)
    q = fused[..., 32:64].unflatten(-1, (2, 16))
    _, theta, positions = inputs(2, 9, 2, 16)
    found = kernels.launch_forward(q, theta.to(DEVICE), positions.to(DEVICE), True)
    torch.testing.assert_close(found.cpu(), lrpe_reference(q.cpu(), theta, positions, "silu"), atol=1e-5, rtol=1e-5)


def test_gradcheck_and_opcheck():
    x, theta, positions = inputs(1, 3, 2, 4, torch.float64)
    x.requires_grad_()
    theta = theta.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, theta: lrpe(x, theta, positions, "silu"), (x, theta))
    opcheck(_forward, (x, theta, positions, True))
    opcheck(_backward, (torch.randn(1, 3, 2, 8).double(), x.detach(), theta.detach(), positions, True))


def test_misuse_is_one_line():
    x, theta, positions = inputs(1, 3, 2, 4)
    with pytest.raises(ValueError, match="allowed: 'silu', None"):
        lrpe(x, theta, positions, "gelu")
    with pytest.raises(ValueError, match=r"lrpe needs x \[B, T, H, d\]"):
        lrpe(x, theta[:1], positions)
    for wrong in ((x, theta, positions.int()), (x, theta.bfloat16(), positions), (x.long(), theta, positions)):
        with pytest.raises(ValueError, match="lrpe needs floating x, theta in float32 or float64 and int64 positions"):
            lrpe(*wrong)
