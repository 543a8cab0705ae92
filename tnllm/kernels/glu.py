"""The product inside a gated linear unit, from one tensor that holds both factors: y = a * b, or silu(a) * b.

    y = glu_product(ab, silu=False)      # [..., 2F] → [..., F]

`ab` comes from one matrix product with the stacked weights. The backward pass writes both gradients into one tensor too,
so that one product sums the two contributions to the input's gradient in its accumulator: it saves a pass over memory
and one rounding.

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
    """[..., 2F] → [..., F]; any floating dtype, computed in fp32 on CUDA. Differentiable (once)."""
    if ab.shape[-1] % 2:
        raise ValueError(f"glu_product splits its last dim in two halves, so it must be even; got {list(ab.shape)}")
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
