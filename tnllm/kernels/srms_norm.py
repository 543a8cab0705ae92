"""SRMSNorm: y = x / sqrt(mean(x^2) + eps) over the last dim, without parameters.

    y = srms_norm(x)            # any shape, any floating dtype; statistics in fp32 (float64 for float64)

Source: TransNormerLLM (arXiv 2307.14995) Eq. 8; the eps is the released code's. A row of zeros stays zero.

The backward pass recomputes the root from x, so only x is saved. Under torch.compile the definition itself is traced, so
that the compiler fuses it with the residual sum before it and the gate after it; otherwise a custom op runs Triton on
CUDA and plain torch on CPU.
"""

import torch
from torch import Tensor

# Widest row that a Triton program can hold.
_MAX_WIDTH = 65536


def srms_norm_reference(x: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition; statistics in fp32 or wider, result in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def srms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last dim: [..., M] → [..., M] of the same dtype. On CUDA M may be up to 65,536 (else ValueError)."""
    if torch.compiler.is_compiling():
        return srms_norm_reference(x, eps)
    if x.is_cuda and x.shape[-1] > _MAX_WIDTH:
        raise ValueError(f"srms_norm on CUDA takes rows of up to {_MAX_WIDTH} channels; got {x.shape[-1]}")
    return _forward(x, eps)


@torch.library.custom_op("tnllm::srms_norm", mutates_args=())
def _forward(x: Tensor, eps: float) -> Tensor:
    if x.is_cuda:
        from tnllm.kernels.srms_norm_triton import launch_forward

        return launch_forward(x, eps)
    return srms_norm_reference(x, eps)


@_forward.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("tnllm::srms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    """dx = r (dy - y mean(y dy)) with r = 1 / sqrt(mean(x^2) + eps) and y = r x."""
    if x.is_cuda:
        from tnllm.kernels.srms_norm_triton import launch_backward

        return launch_backward(dy, x, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
    y, grad = wide * r, dy.to(wide.dtype)
    return ((grad - y * (y * grad).mean(-1, keepdim=True)) * r).to(x.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs, output) -> None:
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, None]:
    return _backward(dy, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_autograd, setup_context=_save)
