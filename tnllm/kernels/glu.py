"""The product inside a gated linear unit, from both its halves side by side: y = a * b, or silu(a) * b.

    y = glu_product(ab, silu=False)      # [..., 2G] → [..., G]

`ab` comes from one matrix product with both weights below one another. So the backward pass writes the gradients of a and b
where one product needs them, which adds up the two contributions to the input in its accumulator: without the pass that
would join them, and without its rounding.

Source: SGLU, TransNormerLLM (arXiv 2307.14995) Eq. 5; SwiGLU (arXiv 2002.05202) Eq. 6 for the baseline.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def glu_product_reference(ab: Tensor, silu: bool = False) -> Tensor:
    """The definition, in ab's dtype."""
    a, b = ab.chunk(2, dim=-1)
    return (F.silu(a) if silu else a) * b


def glu_product(ab: Tensor, silu: bool = False) -> Tensor:
    """[..., 2G] → [..., G]; any floating dtype, computed in fp32 on CUDA. Differentiable (once)."""
    if ab.shape[-1] % 2:
        raise ValueError(f"glu_product needs two halves side by side in its last dim; got {list(ab.shape)}")
    return _forward(ab, silu) if ab.is_cuda else glu_product_reference(ab, silu)


@torch.library.custom_op("tnllm::glu_product", mutates_args=(), device_types="cuda")
def _forward(ab: Tensor, silu: bool) -> Tensor:
    from tnllm.kernels.glu_triton import launch_forward

    return launch_forward(ab, silu)


@_forward.register_fake
def _(ab: Tensor, silu: bool) -> Tensor:
    return ab.new_empty(*ab.shape[:-1], ab.shape[-1] // 2)


@torch.library.custom_op("tnllm::glu_product_backward", mutates_args=(), device_types="cuda")
def _backward(dy: Tensor, ab: Tensor, silu: bool) -> Tensor:
    from tnllm.kernels.glu_triton import launch_backward

    return launch_backward(dy, ab, silu)


@_backward.register_fake
def _(dy: Tensor, ab: Tensor, silu: bool) -> Tensor:
    return ab.new_empty(ab.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ab, ctx.silu = inputs
    ctx.save_for_backward(ab)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, None]:
    return _backward(dy, *ctx.saved_tensors, ctx.silu), None


_forward.register_autograd(_autograd, setup_context=_save)
