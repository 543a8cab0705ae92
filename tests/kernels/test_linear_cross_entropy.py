"""The fused head and loss against the plain one in float64."""

import pytest
import torch
from torch.library import opcheck

from tnllm.kernels import linear_cross_entropy as module
from tnllm.kernels import linear_cross_entropy_triton as kernels
from tnllm.kernels.linear_cross_entropy import _forward, linear_cross_entropy, linear_cross_entropy_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows, width, vocab, dtype=torch.float32, ignored=0.2):
    x, weight = torch.randn(rows, width).to(dtype), 0.3 * torch.randn(vocab, width)
    labels = torch.randint(0, vocab, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    return x, weight, labels


def exact(x, weight, labels):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = linear_cross_entropy_reference(x, weight, labels)
    return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-12))


# bf16 rounds operands and dlogits to 8 bits; the fp32 weight's gradient is still accumulated in fp32.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(1, 4, 2), (37, 16, 101), (130, 8, 33)])
@pytest.mark.parametrize("held", [1 << 22, 150])
def test_loss_and_gradients(monkeypatch, shape, dtype, limit, held):
    monkeypatch.setitem(module._CHUNK_LOGITS, "cpu", held)
    x, weight, labels = inputs(*shape, dtype, ignored=0.2 if shape[0] > 1 else 0.0)
    weight = weight.double() if dtype == torch.float64 else weight
    x.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels)
    grads = torch.autograd.grad(3 * loss, (x, weight))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [grad.dtype for grad in grads] == [x.dtype, weight.dtype]
    expected = exact(x.detach(), weight.detach(), labels)
    assert error(loss.detach(), expected[0]) < limit
    for found, true in zip(grads, expected[1:], strict=True):
        assert error(found, 3 * true) < limit


def test_no_label_counts():
    x, weight, labels = inputs(5, 4, 7, ignored=1.1)
    x.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not weight.grad.any()


def test_without_gradients_none_are_made():
    x, weight, labels = inputs(9, 4, 7)
    _, dx, dweight = _forward(x, weight, labels, -100, False)
    assert dx.numel() == dweight.numel() == 0
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, labels).requires_grad


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("vocab", [1, 5, 4096, 4097, 10_000])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_triton_softmax(vocab, scale):
    logits = scale * torch.randn(6, vocab)
    target = torch.randint(0, vocab, (6,))
    target[2] = -100
    losses, dlogits = kernels.launch_softmax(logits.to(DEVICE), target.to(DEVICE), -100, True, torch.float32)
    wide = logits.double().requires_grad_()
    true = torch.nn.functional.cross_entropy(wide, target, reduction="none")
    grad = torch.autograd.grad(true.sum(), wide)[0]
    # Exponentials of fp32 differences: an error of one part in 10^7 of a logit of 10^4 is 1e-3.
    torch.testing.assert_close(losses.cpu().double(), true.detach(), atol=2e-3 if scale > 1 else 1e-5, rtol=1e-5)
    torch.testing.assert_close(dlogits.cpu().double(), grad, atol=2e-3 if scale > 1 else 1e-6, rtol=1e-4)
    unwanted = kernels.launch_softmax(logits.to(DEVICE), target.to(DEVICE), -100, False, torch.float32)
    assert unwanted[1].numel() == 0 and torch.equal(unwanted[0], losses)


@pytest.mark.slow
def test_autocast_and_compile_change_nothing():
    x, weight, labels = inputs(12, 8, 20)
    weight.requires_grad_()
    plain = linear_cross_entropy(x, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(x, weight, labels), plain)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, labels), plain)


def test_gradcheck_and_opcheck():
    x, weight, labels = inputs(5, 3, 4, torch.float64)
    x.requires_grad_()
    weight = weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), (x, weight))
    opcheck(_forward, (x.detach(), weight.detach(), labels, -100, True))


def test_misuse_is_one_line():
    x, weight, labels = inputs(5, 3, 4)
    with pytest.raises(ValueError, match=r"needs x \[N, M\], weight \[V, M\], labels \[N\]"):
        linear_cross_entropy(x, weight, labels[:3])
    with pytest.raises(ValueError, match=r"int64 labels; got torch.float32, torch.int32"):
        linear_cross_entropy(x, weight, labels.int())
    for label in (-5, 4):
        labels[1] = label
        with pytest.raises(ValueError, match=f"labels must be -100 or from 0 to 3, the rows of weight; got {label}"):
            linear_cross_entropy(x, weight, labels)


@pytest.mark.gpu
def test_large_on_gpu():
    x, weight, labels = (part.cuda() for part in inputs(6000, 256, 64_000, torch.bfloat16))
    weight.requires_grad_()
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels)
    grads = torch.autograd.grad(loss, (x, weight))
    expected = exact(x.detach(), weight.detach().bfloat16(), labels)
    for found, true in zip((loss.detach(), *grads), expected, strict=True):
        assert error(found, true) < 1e-2
