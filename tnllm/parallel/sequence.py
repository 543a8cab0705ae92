"""Sequence parallelism: each rank of a group holds an equal, consecutive slice of the tokens (LASP, arXiv 2404.02882).

    tokens, labels, cu_seqlens, start = shard_sequence(batch_tokens, batch_labels, batch_cu_seqlens, rank, size)
    o = sequence_attention(q, k, v, log_decay, cu_seqlens, rank=rank, size=size, group=name)

Only attention depends on other slices, and all it needs of the previous ranks is one state [H, D, E] per row: the bytes
communicated do not depend on the length. With L tokens in a slice, S_r the state after rank r's own tokens (from zero), R_r
the gradient of the initial state of rank r:

    forward    in_r  = sum_{p < r} decay^(L (r - 1 - p)) S_p           o_t += decay^(t + 1) q_t in_r
    backward   out_r = sum_{p > r} decay^(L (p - 1 - r)) R_p           dk_t += decay^(L - 1 - t) v_t out_r^T, dv alike

S_r and R_r are computed first, in one pass over two of the inputs, and exchanged by one all-gather (as in LASP-2, arXiv
2502.07563) instead of a chain of sends. in_r is then the initial state of the rank's own attention, and out_r the gradient
of its final state, at no further pass. The alternative, attention from zero during the all-gather and a correction
afterwards, was slower (docs/benchmarks).

Packed documents: every rank knows the boundaries, so each can tell which states reach it: those of the document that its
first token continues, back to where that document starts. That is usually few tokens, and attention is linear in the
state, so its contribution is added to them afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tnllm.kernels.gated_attention import gated_attention_reference, launch_backward, launch_forward
from tnllm.kernels.lightning_attention import lightning_attention
from tnllm.parallel.collectives import group_named

# torch 2.13 renamed it.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_local_backward = torch.ops.tnllm.lightning_attention_backward


def shard_sequence(
    tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None, rank: int, size: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rank `rank`'s slice of a batch: tokens and labels [B, T / size], cu_seqlens, and `start`, each row's first position.

    Labels are already the next tokens, so the last one of a slice needs no neighbour. cu_seqlens are relative to the first
    token of the slice and not clipped: a document that began in an earlier slice has a negative start, which gives its
    tokens the right positions, so `start` is None. Without cu_seqlens it is [B] int64.
    """
    length = tokens.shape[1] // size
    assert length * size == tokens.shape[1], (tokens.shape, size)
    first = rank * length
    local = slice(first, first + length)
    if cu_seqlens is None:
        start = torch.full((tokens.shape[0],), first, dtype=torch.int64, device=tokens.device)
        return tokens[:, local], labels[:, local], None, start
    return tokens[:, local], labels[:, local], cu_seqlens - first, None


@dataclass(frozen=True)
class _Reach:
    """How states reach across the slices of packed documents; depends on the boundaries only."""

    head: Tensor  # [L, H] decay^(t + 1) for tokens that continue a document of an earlier slice, else 0
    tail: Tensor  # [L, H] decay^(L - 1 - t) for tokens of the slice's last document, else 0
    weight: Tensor  # [W, W, H]: factor of rank p's state in the initial state of rank r, at [r, p]


def _reach(log_decay: Tensor, length: int, rank: int, size: int, cu_seqlens: Tensor, dtype: torch.dtype) -> _Reach:
    """`cu_seqlens` [N + 1] are relative to this slice's first token, as `shard_sequence` returns them."""
    device = log_decay.device
    g = log_decay.to(dtype)
    index = torch.arange(length, device=device)
    head = (g * (index + 1)[:, None]).exp()
    tail = (g * (length - 1 - index)[:, None]).exp()
    ranks = torch.arange(size, device=device)
    gap = ranks[:, None] - 1 - ranks
    weight = (g * (length * gap.clamp(min=0))[..., None]).exp() * (gap >= 0)[..., None]
    offsets = cu_seqlens.long() + rank * length
    starts, ends = offsets[:-1], offsets[1:].contiguous()
    # The document of each slice's first and last token (never an empty one).
    first_doc = torch.searchsorted(ends, ranks * length, right=True)
    last_doc = torch.searchsorted(ends, (ranks + 1) * length - 1, right=True)
    token = rank * length + index
    head = head * ((token < ends[first_doc[rank]]) & (starts[first_doc[rank]] < rank * length))[:, None]
    tail = tail * (token >= starts[last_doc[rank]])[:, None]
    # Rank p contributes to rank r if the document at the start of slice r began before the end of slice p.
    reaches = starts[first_doc][:, None] < (ranks + 1)[None] * length
    return _Reach(head, tail, weight * reaches[..., None])


def sequence_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, *, rank: int, size: int, group: str
) -> Tensor:
    """Causal linear attention over the slices of all ranks; returns the outputs of this rank's slice.

    q, k [B, L, H, D] and v [B, L, H, E] of one dtype: this rank's slice. log_decay [H] fp32. cu_seqlens [N + 1] int32
    as `shard_sequence` returns them (then B = 1), or None. o [B, L, H, E] in v's dtype. Differentiable (once) in q, k, v.
    """
    return _forward(q, k, v, log_decay, cu_seqlens, rank, size, group)[0]


def _exchange(
    a: Tensor, b: Tensor, log_decay: Tensor, rank: int, size: int, group: str, backward: bool = False
) -> Tensor:
    """The initial state [B, H, D, E] of this slice, from k and v; with `backward` the gradient of its final state, from q
    and do. All-gathers the state after each rank's own tokens."""
    length, g = a.shape[1], log_decay.to(_wide(a))
    if a.is_cuda:
        from tnllm.kernels.lightning_attention.launch import triton_state

        own = triton_state(a, b, log_decay, backward)
    else:
        index = torch.arange(length, device=a.device)
        own = _outer(a, b, (g * (index + 1 if backward else length - 1 - index)[:, None]).exp())
    states, wait = _gather(own, size, group)
    wait()
    senders = range(rank + 1, size) if backward else range(rank)
    if not senders:
        return torch.zeros_like(own)
    states = states[senders.start : senders.stop]
    if len(senders) == 1:
        return states[0]
    # Tokens between a sender's slice and this one.
    gaps = [length * (p - 1 - rank if backward else rank - 1 - p) for p in senders]
    weight = (g * _column(tuple(gaps), a.device)).exp()
    return (states * weight[:, None, :, None, None]).sum(0)


@cache
def _column(values: tuple[int, ...], device: torch.device) -> Tensor:
    """[N, 1]; cached, because a copy to the GPU synchronises."""
    return torch.tensor(values, device=device)[:, None]


def _clip(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    """cu_seqlens within the slice: documents outside it become empty."""
    return cu_seqlens.clamp(0, x.shape[1]).to(torch.int32)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _outer(a: Tensor, b: Tensor, decay: Tensor) -> Tensor:
    """Sum over tokens of decay_t a_t b_t^T: [B, L, H, D], [B, L, H, E], [L, H] → [B, H, D, E], fp32 or wider."""
    a = (a * decay.to(_wide(a))[..., None]).to(a.dtype)
    left, right = a.permute(0, 2, 3, 1).flatten(0, 1), b.transpose(1, 2).flatten(0, 1)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        product = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        product = torch.bmm(left, right).to(_wide(a))
    return product.unflatten(0, (b.shape[0], b.shape[2]))


def _apply(x: Tensor, state: Tensor, decay: Tensor) -> Tensor:
    """decay_t x_t state: [B, L, H, D], [B, H, D, E], [L, H] → [B, L, H, E] in x's dtype."""
    scaled = (x * decay.to(_wide(x))[..., None]).to(x.dtype)
    return (scaled.transpose(1, 2) @ state.to(x.dtype)).transpose(1, 2)


def _gather(state: Tensor, size: int, group: str) -> tuple[Tensor, Callable[[], object]]:
    """Start an all-gather of the ranks' states, [W, B, H, D, E], and what waits for it."""
    states = state.new_empty(size, *state.shape)
    work = _all_gather(states.flatten(0, 1), state.contiguous(), group_named(group), async_op=True)
    return states, work.wait if work is not None else lambda: None


@torch.library.custom_op("tnllm::sequence_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, rank: int, size: int, group: str
) -> tuple[Tensor, Tensor]:
    """The output, and the initial state of this slice."""
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            state = _exchange(k, v, log_decay, rank, size, group)
            o, _ = lightning_attention(q, k, v, log_decay, state, None, need_state=False)
            return o.contiguous(), state
        reach = _reach(log_decay, q.shape[1], rank, size, cu_seqlens, _wide(q))
        states, wait = _gather(_outer(k, v, reach.tail), size, group)
        o, _ = lightning_attention(q, k, v, log_decay, None, _clip(cu_seqlens, q), need_state=False)
        wait()
        # Contiguous, as from `_exchange`.
        state = torch.einsum("ph,pbhde->bhde", reach.weight[rank], states).contiguous()
        return (o + _apply(q, state, reach.head)).contiguous(), state


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    state = q.new_empty(q.shape[0], *q.shape[2:], v.shape[-1], dtype=_wide(q))
    return v.new_empty(v.shape), state


@torch.library.custom_op("tnllm::sequence_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    rank: int,
    size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            grad = _exchange(q, do, log_decay, rank, size, group, backward=True)
            dq, dk, dv, _ = _local_backward(do, grad, q, k, v, log_decay, state, None)
            return dq.contiguous(), dk.contiguous(), dv.contiguous()
        reach = _reach(log_decay, q.shape[1], rank, size, cu_seqlens, _wide(q))
        states, wait = _gather(_outer(q, do, reach.head), size, group)
        dq, dk, dv, _ = _local_backward(do, None, q, k, v, log_decay, None, _clip(cu_seqlens, q))
        dq = dq + _apply(do, state.mT, reach.head)
        wait()
        grad = torch.einsum("ph,pbhde->bhde", reach.weight[:, rank], states)
        dk, dv = dk + _apply(v, grad.mT, reach.tail), dv + _apply(k, grad, reach.tail)
        return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_decay, cu_seqlens, ctx.rank, ctx.size, ctx.group = inputs
    ctx.save_for_backward(q, k, v, log_decay, output[1], cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, do: Tensor, _dstate: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
    grads = _backward(do, q, k, v, log_decay, state, cu_seqlens, ctx.rank, ctx.size, ctx.group)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_save)


def sequence_gated_attention(
    qkvu: Tensor,
    log_decay: Tensor,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    *,
    rank: int,
    size: int,
    group: str,
) -> Tensor:
    """`gated_attention` over the slices of all ranks: qkvu [B, L, 4M] of this rank's slice → y [B, L, M]."""
    if qkvu.is_cuda and cu_seqlens is None:
        return _gated_forward(qkvu, log_decay, eps, rank, size, group)[0]
    attend = partial(sequence_attention, rank=rank, size=size, group=group)
    return gated_attention_reference(qkvu, log_decay, eps, cu_seqlens, attend)


@torch.library.custom_op("tnllm::sequence_gated_attention", mutates_args=(), device_types="cuda")
def _gated_forward(
    qkvu: Tensor, log_decay: Tensor, eps: float, rank: int, size: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `launch_forward` of `gated_attention`."""
    initial_state = partial(_exchange, log_decay=log_decay, rank=rank, size=size, group=group)
    y, qk, o, state = launch_forward(qkvu, log_decay, eps, None, initial_state)
    assert state is not None
    return y, qk, o, state


@_gated_forward.register_fake
def _(
    qkvu: Tensor, log_decay: Tensor, eps: float, rank: int, size: int, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, width, heads = qkvu.shape[:-1], qkvu.shape[-1] // 4, log_decay.shape[0]
    state = qkvu.new_empty(qkvu.shape[0], heads, width // heads, width // heads, dtype=torch.float32)
    return qkvu.new_empty(*shape, width), qkvu.new_empty(*shape, 2 * width), qkvu.new_empty(*shape, width), state


@torch.library.custom_op("tnllm::sequence_gated_attention_backward", mutates_args=(), device_types="cuda")
def _gated_backward(
    dy: Tensor,
    qkvu: Tensor,
    qk: Tensor,
    o: Tensor,
    state: Tensor,
    log_decay: Tensor,
    eps: float,
    rank: int,
    size: int,
    group: str,
) -> Tensor:
    final_gradient = partial(_exchange, log_decay=log_decay, rank=rank, size=size, group=group, backward=True)
    return launch_backward(dy, qkvu, qk, o, log_decay, eps, None, state, final_gradient)


@_gated_backward.register_fake
def _(dy: Tensor, qkvu: Tensor, *rest: object) -> Tensor:
    return qkvu.new_empty(qkvu.shape)


def _gated_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkvu, log_decay, ctx.eps, ctx.rank, ctx.size, ctx.group = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(qkvu, *output[1:], log_decay)


def _gated_autograd(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad = _gated_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.rank, ctx.size, ctx.group)
    return grad, None, None, None, None, None


_gated_forward.register_autograd(_gated_autograd, setup_context=_gated_save)
