"""The definition of Lightning Attention, in two forms short enough to check by eye; all others are tested against it.

    o, state = recurrent(q, k, v, log_decay)        # the definition, token by token
    o, state = quadratic(q, k, v, log_decay)        # the same as a masked matrix product, [T, T] per head

Both are plain differentiable torch on any device and dtype, computed in float64 for float64 inputs and in float32
otherwise. Shapes: q, k [B, T, H, D]; v, o [B, T, H, E]; log_decay [H]; states [B, H, D, E]. With `cu_seqlens` [N + 1],
B is 1, the tokens of N sequences (some may be empty) are packed, and states are [N, H, D, E].

Sources: TransNormerLLM (arXiv 2307.14995) Eq. 2 and section 3.3; Lightning Attention-2 (arXiv 2401.04658).
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay) S_{t-1} + k_t v_t^T ; o_t = q_t^T S_t. A token enters undecayed and before q."""

    def sequence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [v[:, :0]]
        for t in range(q.shape[1]):
            state = g.exp()[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append((q[:, t, :, :, None] * state).sum(-2).unsqueeze(1))
        return torch.cat(outputs, 1), state

    return _each_sequence(sequence, q, k, v, log_decay, initial_state, cu_seqlens)


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = sum over s <= t of exp(log_decay (t - s)) (q_t . k_s) v_s, plus the decayed initial state."""

    def sequence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.arange(q.shape[1], device=q.device)
        gap = t[:, None] - t[None, :]
        # Masked by index, not by decay: a head with log_decay = 0 must be causal too.
        decay = torch.where(gap >= 0, (g[:, None, None] * gap.clamp(min=0)).exp(), 0.0)
        from_start = (g[None, :] * (t[:, None] + 1)).exp()[..., None]
        to_end = (g[None, :] * (len(t) - 1 - t[:, None])).exp()[..., None]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * decay
        o = torch.einsum("bhij,bjhe->bihe", scores, v)
        o = o + torch.einsum("bihd,bhde->bihe", q * from_start, state)
        final = (g * len(t)).exp()[:, None, None] * state + torch.einsum("bjhd,bjhe->bhde", k * to_end, v)
        return o, final

    return _each_sequence(sequence, q, k, v, log_decay, initial_state, cu_seqlens)


def _each_sequence(
    sequence: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_seqs = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = torch.zeros(num_seqs, *q.shape[2:], v.shape[-1], device=q.device)
    q, k, wide_v, g, state = (x.to(dtype) for x in (q, k, v, log_decay, initial_state))
    if cu_seqlens is None:
        o, final = sequence(q, k, wide_v, g, state)
        return o.to(v.dtype), final
    ends = cu_seqlens.tolist()
    parts = [
        sequence(q[:, a:b], k[:, a:b], wide_v[:, a:b], g, state[n : n + 1]) for n, (a, b) in enumerate(pairwise(ends))
    ]
    return torch.cat([o for o, _ in parts], 1).to(v.dtype), torch.cat([final for _, final in parts])
