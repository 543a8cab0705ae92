"""What the layers compute with: plain torch, and the Triton kernels of Lightning Attention on CUDA.

In tnllm these names are operators registered with torch, for the whole process. Here nothing is registered, so several
folders load in one process. Definitions that tnllm's kernels are tested against follow at the end of the file.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnllm.convert.hf_code.rows import Rows
from tnllm.kernels.gated_attention import gated_attention_reference
from tnllm.kernels.glu import glu_product_reference
from tnllm.kernels.lightning_attention.chunk import chunk_backward, chunk_forward, chunk_step
from tnllm.kernels.lrpe import lrpe_reference
from tnllm.kernels.srms_norm import srms_norm_reference
from tnllm.modeling.cache import attend_cache

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
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, rows: Rows | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention and the state [B, H, D, E] after each row's last token; shapes as above, `rows` says what follows what.

    One token with a state and without gradients is a decoding step, which updates the state in place.
    """
    if torch.compiler.is_compiling() or q.is_meta:
        return traced_attention(q, k, v, log_decay, state, rows)
    if q.shape[1] == 1 and rows is None and state is not None and not torch.is_grad_enabled():
        return lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state)[:, None], state
    if rows is None:
        return LightningAttention.apply(q, k, v, log_decay, state, None)
    if not len(rows.index):
        return torch.zeros_like(v), state
    initial = None if state is None else rows.initial(state)
    o, final = LightningAttention.apply(*map(rows.pack, (q, k, v)), log_decay, initial, rows.cu_seqlens)
    return rows.unpack(o), final[rows.last]


def traced_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, rows: Rows | None
) -> tuple[Tensor, Tensor]:
    """The same for torch.compile and torch.export: no shape and no branch depends on values, and there is no loop.

    A token's time is the number of tokens up to it in its row, so padding takes no time. Chunks of C tokens are computed
    as in the kernels' chunked torch form, and the states before all chunks are one product with the decays between chunks.
    """
    (B, T), dtype = q.shape[:2], v.dtype
    wide = torch.promote_types(q.dtype, torch.float32)
    if rows is None:
        keep = torch.ones(B, T, dtype=torch.bool, device=q.device)
        time, text = keep.cumsum(-1), torch.zeros(B, T, dtype=torch.int64, device=q.device)
    else:
        keep, time, text = rows.keep, rows.count, rows.text
    C = 64
    # Chunks by index, and never a single one: views and padding would make a graph that holds for some lengths only.
    column = torch.arange(T // C + 2, device=q.device)[:, None] * C + torch.arange(C, device=q.device)
    real, column = column < T, column.clamp(max=T - 1)
    q, k, v = (x.to(wide).transpose(1, 2)[:, :, column] for x in (q, k, v))  # [B, H, N, C, D]
    # Columns added at the end belong to the last text and take no time.
    keep, time, text = keep[:, column] & real, time[:, column], text[:, column]

    def decay(gap: Tensor, allowed: Tensor) -> Tensor:
        """exp(log_decay * gap) of every head where allowed, else 0: [B, ...] → [B, H, ...]."""
        g = log_decay.to(wide).view(-1, *(1,) * (gap.ndim - 1))
        return torch.where(allowed[:, None], (g * gap.clamp(min=0)[:, None]).exp(), 0.0)

    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    same = (text[..., :, None] == text[..., None, :]) & keep[..., :, None] & keep[..., None, :] & causal
    o = ((q @ k.mT) * decay(time[..., :, None] - time[..., None, :], same)) @ v
    # Time and text after each chunk and before it, [B, N].
    time_after, text_after = time[..., -1], text[..., -1]
    chunk = torch.arange(column.shape[0], device=q.device)
    time_before, text_before = (torch.where(chunk > 0, x[:, chunk - 1], 0) for x in (time_after, text_after))
    into = decay(time_after[..., None] - time, keep & (text == text_after[..., None]))
    update = (k * into[..., None]).mT @ v
    # The state before each chunk; the last one is empty, so that is also the state at the end.
    earlier = (chunk[:, None] > chunk) & (text_before[..., :, None] == text_after[..., None, :])
    states = (decay(time_before[..., :, None] - time_after[..., None, :], earlier) @ update.flatten(-2)).unflatten(
        -1, update.shape[-2:]
    )
    if state is not None:
        states = states + decay(time_before, text_before == 0)[..., None, None] * state[:, :, None].to(wide)
    reach = decay(time - time_before[..., None], keep & (text == text_before[..., None]))
    o = o + (q * reach[..., None]) @ states
    every = torch.arange(T, device=q.device)
    return o[:, :, every // C, every % C].transpose(1, 2).to(dtype), states[:, :, -1]


def lightning_attention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """One token: q, k [B, H, D], v [B, H, E] → o [B, H, E]; the state [B, H, D, E] is updated in place."""
    return (triton_step if use_triton(q, v) else chunk_step)(q, k, v, log_decay, state)


def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rows: Rows | None = None) -> Tensor:
    """Attention alone, from a zero state."""
    return lightning_attention(q, k, v, log_decay, None, rows)[0]


def gated_attention(qkvu: Tensor, log_decay: Tensor, eps: float, rows: Rows | None = None) -> Tensor:
    """SRMSNorm(attention(silu(q), silu(k), v)) * u, [B, T, 4M] → [B, T, M]."""
    return gated_attention_reference(qkvu, log_decay, eps, rows, attend)  # type: ignore[arg-type]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cache: Tensor | None = None,
    mask: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q, k, v [B, T, H, d], rotated → o [B, T, H, d], and the cache [B, 2, S, H, d] with these columns appended.

    `mask` [B, T, S + T]: the columns that each one attends to; None: causal, without a cache.
    """
    new = torch.stack([k, v], dim=1)
    if mask is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None
    both = new if cache is None else torch.cat([cache, new.to(cache.dtype)], dim=2)
    return attend_cache(q, both, mask), None if cache is None else both


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
