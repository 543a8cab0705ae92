"""Gated linear attention between its two projections as one operator: most layers of a training step.

    y = gated_attention(qkvu, log_decay, eps=1e-6)      # [B, T, 4M] → [B, T, M]

Equals `gated_attention_reference`: SiLU of q and k, Lightning Attention, SRMSNorm over all heads, gate. As one operator
its backward pass writes the gradients of q, k, v and u straight into the gradient of the projection, with no
concatenation afterwards.

Source: TransNormerLLM (arXiv 2307.14995) Eq. 3-4 and 8; the order is the released code's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.kernels.lightning_attention import lightning_attention
from tnllm.kernels.srms_norm import srms_norm


def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Attention from a zero state that returns no final state, as in training."""
    return lightning_attention(q, k, v, log_decay, None, cu_seqlens, need_state=False)[0]


def gated_attention_reference(
    qkvu: Tensor,
    log_decay: Tensor,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor] = attend,
) -> Tensor:
    """The definition; arguments as in `gated_attention`, and the attention to use."""
    q, k, v, u = qkvu.chunk(4, dim=-1)
    q, k, v = (x.unflatten(-1, (log_decay.shape[0], -1)) for x in (F.silu(q), F.silu(k), v))
    return srms_norm(attend(q, k, v, log_decay, cu_seqlens).flatten(-2), eps) * u


def gated_attention(qkvu: Tensor, log_decay: Tensor, eps: float = 1e-6, cu_seqlens: Tensor | None = None) -> Tensor:
    """SRMSNorm(attention(silu(q), silu(k), v)) * u from the fused projection.

    qkvu [B, T, 4M]: q, k, v and u side by side, each of H heads; bf16, fp16 or fp32 (on CPU also float64).
    log_decay [H] fp32 and cu_seqlens as in `lightning_attention`; starts from a zero state and returns no final state.
    Returns y [B, T, M]. Differentiable (once) in qkvu. Raises ValueError for shapes that do not fit, and on CPU what
    `lightning_attention` raises; on CUDA the values of log_decay and cu_seqlens are trusted.
    """
    if qkvu.dim() != 3 or log_decay.dim() != 1 or not len(log_decay) or qkvu.shape[-1] % (4 * len(log_decay)):
        raise ValueError(
            "gated_attention needs qkvu [B, T, 4M] with M a multiple of H, and log_decay [H]; "
            f"got {list(qkvu.shape)}, {list(log_decay.shape)}"
        )
    if not qkvu.is_cuda:
        return gated_attention_reference(qkvu, log_decay, eps, cu_seqlens)
    return _forward(qkvu, log_decay, eps, cu_seqlens)[0]


def _heads(x: Tensor, log_decay: Tensor) -> Tensor:
    return x.unflatten(-1, (log_decay.shape[0], -1))


def launch_forward(
    qkvu: Tensor,
    log_decay: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
    initial_state: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y, and what the backward pass reads: silu(q) and silu(k) [B, T, 2M], attention's output [B, T, M], and the initial
    state [B, H, D, E], which is `initial_state(k, v)` (None: zeros)."""
    from tnllm.kernels.gated_attention_triton import norm_gate, silu
    from tnllm.kernels.lightning_attention.launch import triton_forward

    qkvu = qkvu.contiguous()
    width = qkvu.shape[-1] // 4
    qk = silu(qkvu[..., : 2 * width])
    q, k, v = (_heads(x, log_decay) for x in (*qk.chunk(2, dim=-1), qkvu[..., 2 * width : 3 * width]))
    initial = None if initial_state is None else initial_state(k, v)
    o = triton_forward(q, k, v, log_decay, initial, cu_seqlens, need_state=False)[0].flatten(-2)
    return norm_gate(o, qkvu[..., 3 * width :], eps), qk, o, initial


def launch_backward(
    dy: Tensor,
    qkvu: Tensor,
    qk: Tensor,
    o: Tensor,
    log_decay: Tensor,
    eps: float,
    cu_seqlens: Tensor | None,
    initial: Tensor | None = None,
    final_gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The gradient of qkvu; `initial` from `launch_forward`, `final_gradient(q, do)` the gradient of the final state."""
    from tnllm.kernels.gated_attention_triton import norm_gate_backward, silu_backward_
    from tnllm.kernels.lightning_attention.launch import triton_backward

    dqkvu = torch.empty(qkvu.shape, dtype=qkvu.dtype, device=qkvu.device)
    qkvu, width = qkvu.contiguous(), qkvu.shape[-1] // 4
    do = norm_gate_backward(dy.contiguous(), o, qkvu[..., 3 * width :], dqkvu[..., 3 * width :], eps)
    q, k, v = (_heads(x, log_decay) for x in (*qk.chunk(2, dim=-1), qkvu[..., 2 * width : 3 * width]))
    dq, dk, dv, _ = (_heads(x, log_decay) for x in dqkvu.chunk(4, dim=-1))
    do = _heads(do, log_decay)
    dfinal = None if final_gradient is None else final_gradient(q, do)
    triton_backward(do, dfinal, q, k, v, log_decay, initial, cu_seqlens, into=(dq, dk, dv))
    silu_backward_(dqkvu[..., : 2 * width], qkvu[..., : 2 * width])
    return dqkvu


@torch.library.custom_op("tnllm::gated_attention", mutates_args=(), device_types="cuda")
def _forward(qkvu: Tensor, log_decay: Tensor, eps: float, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(qkvu, log_decay, eps, cu_seqlens)[:3]


@_forward.register_fake
def _(qkvu: Tensor, log_decay: Tensor, eps: float, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    shape, width = qkvu.shape[:-1], qkvu.shape[-1] // 4
    return qkvu.new_empty(*shape, width), qkvu.new_empty(*shape, 2 * width), qkvu.new_empty(*shape, width)


@torch.library.custom_op("tnllm::gated_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    dy: Tensor, qkvu: Tensor, qk: Tensor, o: Tensor, log_decay: Tensor, eps: float, cu_seqlens: Tensor | None
) -> Tensor:
    return launch_backward(dy, qkvu, qk, o, log_decay, eps, cu_seqlens)


@_backward.register_fake
def _(dy: Tensor, qkvu: Tensor, *rest: object) -> Tensor:
    return qkvu.new_empty(qkvu.shape)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    qkvu, log_decay, ctx.eps, cu_seqlens = inputs
    _, qk, o = output
    ctx.mark_non_differentiable(qk, o)
    ctx.save_for_backward(qkvu, qk, o, log_decay, cu_seqlens)


def _autograd(ctx, dy: Tensor, _dqk: Tensor, _do: Tensor) -> tuple[Tensor | None, ...]:
    qkvu, qk, o, log_decay, cu_seqlens = ctx.saved_tensors
    return _backward(dy, qkvu, qk, o, log_decay, ctx.eps, cu_seqlens), None, None, None


_forward.register_autograd(_autograd, setup_context=_save)
