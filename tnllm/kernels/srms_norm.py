"""SRMSNorm: y = x / sqrt(mean(x^2) + eps) over the last dim, without parameters.

    y = srms_norm(x)            # any shape, any floating dtype; statistics in fp32 (float64 for float64)

Source: TransNormerLLM (arXiv 2307.14995) Eq. 8; the eps is the released code's. A row of zeros stays zero.
"""

import torch
from torch import Tensor


def srms_norm_reference(x: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, in the precision of its input."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def srms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last dim: [..., M] → [..., M] of the same dtype."""
    return _forward(x, eps)[0]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.library.custom_op("tnllm::srms_norm", mutates_args=())
def _forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and the inverse root r [...] that the backward pass needs."""
    wide = _wide(x)
    r = (wide.square().mean(-1) + eps).rsqrt_()
    return (wide * r[..., None]).to(x.dtype), r


@_forward.register_fake
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("tnllm::srms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """dx = r (dy - y mean(y dy)) with y = r x; the saved r makes a row of zeros safe."""
    wide = _wide(x) * r[..., None]
    grad = _wide(dy)
    grad = grad - wide * (wide * grad).mean(-1, keepdim=True)
    return grad.mul_(r[..., None]).to(x.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, r: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dy: Tensor, _dr: Tensor) -> tuple[Tensor, None]:
    return _backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=_save)
