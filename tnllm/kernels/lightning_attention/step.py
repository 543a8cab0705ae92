"""One decoding step on the GPU: S <- decay S + k v^T in place, o = q^T S.

Bound by memory: the state is read and written once (64 KiB per head at D = E = 128, each way). Each program holds all D
rows of BE columns of one head's state, updates them and reduces them against q.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["H"])
def step_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, log_decay_ptr, state_ptr, rows_ptr, fresh_ptr,
    q_b, q_h, q_d, k_b, k_h, k_d, v_b, v_h, v_e, o_b, o_h, s_b, s_h, s_d, s_e, H,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, E / BE)."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    state_row = tl.load(rows_ptr + row).to(tl.int64) if BY_ROW else row
    state_ptrs = state_ptr + state_row * s_b + head * s_h + d[:, None] * s_d + e[None, :] * s_e
    mask = (d[:, None] < D) & (e[None, :] < E)
    if BY_ROW:
        mask = mask & (state_row >= 0)
    known = mask & (tl.load(fresh_ptr + row) == 0) if BY_ROW else mask
    state = tl.load(state_ptrs, mask=known, other=0.0)
    q = tl.load(q_ptr + row * q_b + head * q_h + d * q_d, mask=d < D, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * k_b + head * k_h + d * k_d, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * v_b + head * v_h + e * v_e, mask=e < E, other=0.0).to(tl.float32)
    # decay - 1, because the slowest decays (1 - 4e-8) are not representable in float32; see chunk_step.
    g = tl.load(log_decay_ptr + head)
    decay_minus_1 = tl.where(g > -0.01, g * (1.0 + g * (0.5 + g * 0.16666667)), tl.exp(g) - 1.0)
    state += decay_minus_1 * state + k[:, None] * v[None, :]
    tl.store(state_ptrs, state, mask=mask)
    o = tl.sum(q[:, None] * state, 0).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + row * o_b + head * o_h + e, o, mask=e < E)


def triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    rows: Tensor | None = None,
    fresh: Tensor | None = None,
) -> Tensor:
    """q, k [B, H, D], v [B, H, E], any strides -> o [B, H, E]. The state [B, H, D, E] is updated in place.

    With rows [B] integer and fresh [B] bool, sequence b has row rows[b] of `state`, and starts from zero if fresh[b]. Of
    a row below 0 nothing is read or written, and its o is undefined.
    """
    B, H, D = q.shape
    E = v.shape[-1]
    o = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    # 32 columns of fp32 state are one 128-byte cache line per row.
    step_kernel[(B * H, triton.cdiv(E, 32))](
        q, k, v, o, log_decay.contiguous(), state,
        None if rows is None else rows.contiguous(), None if fresh is None else fresh.contiguous(),
        *q.stride(), *k.stride(), *v.stride(), *o.stride()[:2], *state.stride(), H,
        D=D, E=E, BD=triton.next_power_of_2(D), BE=32, BY_ROW=rows is not None, num_warps=4 if D <= 128 else 8,
    )  # fmt: skip
    return o
