"""What the layers compute with: plain torch, and the Triton kernels of Lightning Attention on CUDA.

In tnllm these names are operators registered with torch, for the whole process. Here nothing is registered, so several
folders load in one process. Definitions that tnllm's kernels are tested against follow at the end of the file.
"""

from typing import Any

import torch
from torch import Tensor

from tnllm.kernels.gated_attention import gated_attention_reference
from tnllm.kernels.glu import glu_product_reference
from tnllm.kernels.lightning_attention.chunk import chunk_backward, chunk_forward, chunk_step
from tnllm.kernels.lrpe import lrpe_reference
from tnllm.kernels.srms_norm import srms_norm_reference

try:
    from tnllm.kernels.lightning_attention.launch import triton_backward, triton_forward
    from tnllm.kernels.lightning_attention.step import triton_step

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

# Head dims that the Triton kernels support; others use the torch implementation.
TRITON_DIMS = (32, 64, 96, 128, 192, 256)


def use_triton(q: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernels support these tensors."""
    supported = q.shape[-1] in TRITON_DIMS and v.shape[-1] in TRITON_DIMS and q.dtype != torch.float64
    return HAS_TRITON and q.is_cuda and supported


class LightningAttention(torch.autograd.Function):
    """S_t = exp(log_decay) S_{t-1} + k_t v_t^T and o_t = q_t^T S_t per head, from an initial state, with packing.

    q, k [B, T, H, D], v [B, T, H, E], log_decay [H] fp32, state [B or N, H, D, E] fp32 or None, cu_seqlens [N + 1] or None.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v, log_decay, state, cu_seqlens)
        ctx.set_materialize_grads(False)
        if use_triton(q, v):
            return triton_forward(q, k, v, log_decay, state, cu_seqlens, True)
        return chunk_forward(q, k, v, log_decay, state, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do
        run = triton_backward if use_triton(q, v) else chunk_backward
        dq, dk, dv, dstate = run(do, dfinal, q, k, v, log_decay, state, cu_seqlens)
        return dq, dk, dv, None, None if state is None else dstate, None


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the new state; shapes as above.

    One token with a state and without gradients is a decoding step, which updates the state in place.
    """
    if q.shape[1] == 1 and cu_seqlens is None and state is not None and not torch.is_grad_enabled():
        return lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state)[:, None], state
    return LightningAttention.apply(q, k, v, log_decay, state, cu_seqlens)


def lightning_attention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, H, D], v [B, H, E] → o [B, H, E]; the state [B, H, D, E] is updated in place."""
    return (triton_step if use_triton(q, v) else chunk_step)(q, k, v, log_decay, state)


def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Attention alone, from a zero state."""
    return lightning_attention(q, k, v, log_decay, None, cu_seqlens)[0]


def gated_attention(qkvu: Tensor, log_decay: Tensor, eps: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """SRMSNorm(attention(silu(q), silu(k), v)) * u, [B, T, 4M] → [B, T, M]."""
    return gated_attention_reference(qkvu, log_decay, eps, cu_seqlens, attend)


def glu_product(ab: Tensor, silu: bool = False) -> Tensor:
    """The product of the two halves of the last dim, [..., 2F] → [..., F]."""
    return glu_product_reference(ab, silu)


def lrpe(x: Tensor, theta: Tensor, positions: Tensor, activation: str | None = None) -> Tensor:
    """[a cos(theta t); a sin(theta t)] with a = activation(x), [B, T, H, d] → [B, T, H, 2d], at least in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return lrpe_reference(wide, theta, positions, activation).to(x.dtype)


def srms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dim; the mean is fp32."""
    return srms_norm_reference(x, eps)
