"""Gated attention as one operator: the Triton launches against the parts in float64; the op itself on a GPU."""

import pytest
import torch
from torch.library import opcheck

from tnllm.kernels import gated_attention as op
from tnllm.kernels.lightning_attention.launch import triton_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32: three tf32 products (1e-6) and sums over a row. 16 bits: the result and three intermediates are rounded once each;
# Triton's interpreter truncates to bf16, twice a rounding.
LIMIT = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3 if DEVICE == "cuda" else 1.6e-2}


def inputs(B, T, H, D, dtype, lengths=None):
    qkvu = torch.randn(B, T, 4 * H * D).to(DEVICE, dtype)
    log_decay = -torch.tensor([0.0, 0.84, 0.05, 0.0039])[:H].to(DEVICE)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE) if lengths else None
    return qkvu, torch.randn(B, T, H * D).to(DEVICE, dtype), log_decay, cu_seqlens


def exact(qkvu, dy, log_decay, cu_seqlens):
    qkvu = qkvu.cpu().double().requires_grad_()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.cpu()
    y = op.gated_attention_reference(qkvu, log_decay.cpu(), 1e-6, cu_seqlens)
    return y.detach(), torch.autograd.grad(y, qkvu, dy.cpu().double())[0]


def error(found, expected):
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("B", "T", "H", "D", "lengths"), [(2, 35, 3, 32, None), (1, 70, 1, 96, None), (1, 67, 2, 32, [33, 0, 34])]
)
def test_triton(B, T, H, D, lengths, dtype):
    qkvu, dy, log_decay, cu_seqlens = inputs(B, T, H, D, dtype, lengths)
    y, qk, o, _ = op.launch_forward(qkvu, log_decay, 1e-6, cu_seqlens)
    dqkvu = op.launch_backward(dy, qkvu, qk, o, log_decay, 1e-6, cu_seqlens)
    expected = exact(qkvu, dy, log_decay, cu_seqlens)
    assert error(y, expected[0]) < LIMIT[dtype]
    for part, true in zip(dqkvu.chunk(4, dim=-1), expected[1].chunk(4, dim=-1), strict=True):
        assert error(part, true) < LIMIT[dtype]


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
def test_two_slices_are_the_whole():
    """The second slice starts from the state that the first leaves, and the first gets its gradient back."""
    qkvu, dy, log_decay, _ = inputs(2, 70, 2, 32, torch.float32)
    expected = exact(qkvu, dy, log_decay, None)
    x, dx = zip((qkvu[:, :41], dy[:, :41]), (qkvu[:, 41:], dy[:, 41:]), strict=True)
    left = []

    def first(k, v):
        left.append(triton_state(k, v, log_decay))
        return torch.zeros_like(left[0])

    def second(q, do):
        left.append(triton_state(q, do, log_decay, reverse=True))
        return torch.zeros_like(left[1])

    y_1, *saved_1 = op.launch_forward(x[0], log_decay, 1e-6, None, first)
    y_2, *saved_2 = op.launch_forward(x[1], log_decay, 1e-6, None, lambda k, v: left[0])
    d_2 = op.launch_backward(dx[1], x[1], *saved_2[:2], log_decay, 1e-6, None, saved_2[2], second)
    d_1 = op.launch_backward(dx[0], x[0], *saved_1[:2], log_decay, 1e-6, None, saved_1[2], lambda q, do: left[1])
    assert error(torch.cat([y_1, y_2], 1), expected[0]) < LIMIT[torch.float32]
    for part, true in zip(torch.cat([d_1, d_2], 1).chunk(4, dim=-1), expected[1].chunk(4, dim=-1), strict=True):
        assert error(part, true) < LIMIT[torch.float32]


def test_on_cpu_it_is_its_parts():
    qkvu, _, log_decay, _ = inputs(2, 9, 2, 16, torch.float32)
    expected = op.gated_attention_reference(qkvu.cpu(), log_decay.cpu())
    assert torch.equal(op.gated_attention(qkvu.cpu(), log_decay.cpu()), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T", "H", "D", "lengths"), [(2, 1000, 4, 128, None), (1, 3001, 4, 64, [1500, 0, 1501])])
def test_op_on_gpu(B, T, H, D, lengths):
    qkvu, dy, log_decay, cu_seqlens = inputs(B, T, H, D, torch.bfloat16, lengths)
    qkvu.requires_grad_()
    y = op.gated_attention(qkvu, log_decay, 1e-6, cu_seqlens)
    expected = exact(qkvu.detach(), dy, log_decay, cu_seqlens)
    assert error(y, expected[0]) < LIMIT[torch.bfloat16]
    assert error(torch.autograd.grad(y, qkvu, dy)[0], expected[1]) < LIMIT[torch.bfloat16]
    opcheck(op._forward, (qkvu, log_decay, 1e-6, cu_seqlens))


def test_shapes_that_do_not_fit_are_one_line():
    for shape, heads in (((1, 3, 10), 2), ((3, 16), 2), ((1, 3, 16), 0)):
        with pytest.raises(ValueError, match=r"gated_attention needs qkvu \[B, T, 4M\] with M a multiple of H"):
            op.gated_attention(torch.randn(shape), torch.zeros(heads))
    with pytest.raises(ValueError, match="log_decay must be finite and <= 0"):
        op.gated_attention(torch.randn(1, 3, 16), torch.tensor([0.0, float("nan")]))
