"""One decode step of a large model in one persistent Triton kernel, for batches so small that launches dominate.

A small batch reads every weight once per token: 0.2 ms at 385M. Launched as hundreds of kernels, most of the time goes
into starting and draining them. Here one program per SM stays resident for the whole step. Each owns the rows
r = program_id mod P of every matrix, and a grid barrier separates the phases (see the package's docstring).

Weights do not depend on activations, so before it waits at a barrier a program loads its first tile of the next matrix
into registers and prefetches the second into L2: the memory bus stays busy during the wait. The vectors between the phases
are fp32 and stay in L2. A phase reads its vector into registers once; the norm scales the products, not the vector.
`narrow.py` is faster for smaller models.
"""

import torch
import triton
import triton.language as tl

from tnllm.kernels.decode_step.common import (
    DOWN,
    GATE,
    NUM_COLUMNS,
    OUT,
    QKVU,
    STATE,
    THETA,
    UP,
    DecodeModel,
    exp_minus_one,
    launch_options,
    load_pointer,
    num_programs,
    prefetch_l2,
    program_rows,
    silu,
    update_state,
)

# Elements of a weight tile: 64 KiB of bf16, 256 bytes per thread, so that one tile can be in flight while another is used.
# On an H100 a step of 7B took 5.14 ms, with tiles half as large 5.51, as a graph of the model's kernels 5.88.
_TILE = 32768
_NUM_WARPS = 8
# Every further row repeats each tile's sum over all warps: four rows took 1.26 ms at 385M, as long as the model's kernels.
MAX_BATCH = 1


@triton.jit
def _arrive(counter):
    """Release: this program's stores are visible to any program that observes the count."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, target):
    """Acquire: spin until `target` arrivals were counted."""
    count = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while count < target:
        count = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@triton.jit
def _load_tile(w, tile, num_rows, P, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """[R, BK] of a [num_rows, K] matrix, in its dtype."""
    r, k = program_rows(tile, P, R), tl.arange(0, BK)
    p_w = w + r.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(p_w, mask=(r < num_rows)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _prefetch_tile(w, tile, num_rows, P, R: tl.constexpr, K: tl.constexpr, PREFETCH: tl.constexpr):
    """Prefetch a tile into L2 if PREFETCH, each row in four parts."""
    if PREFETCH:
        r, lane = program_rows(tile, P, R), tl.arange(0, 32)[None, :]
        QUARTER: tl.constexpr = K // 4
        p_w = (w + r.to(tl.int64) * K)[:, None] + lane // 8 * QUARTER
        size = QUARTER * (w.dtype.element_ty.primitive_bitwidth // 8)
        prefetch_l2(p_w, size, (r < num_rows)[:, None] & (lane % 8 == 0))


@triton.jit
def _load_vector(x, K: tl.constexpr, BK: tl.constexpr):
    k = tl.arange(0, BK)
    return tl.load(x + k, mask=k < K, other=0.0)


@triton.jit
def _load_inputs(x, x_b, gate, gate_b, eps, NORM: tl.constexpr, B: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """For each row of the batch y = x (* gate) and the scale of its products: with NORM 1 / sqrt(mean(x^2) + eps), else 1.

    x_b and gate_b are the strides from one row of the batch to the next.
    """
    ys, scales = (), ()
    for b in tl.static_range(B):
        y = _load_vector(x + b * x_b, K, BK)
        scale = tl.rsqrt(tl.sum(y * y, 0) / K + eps) if NORM else tl.full([], 1.0, tl.float32)
        if gate is not None:
            y *= _load_vector(gate + b * gate_b, K, BK)
        ys = ys + (y,)
        scales = scales + (scale,)
    return ys, scales


@triton.jit
def _matvec(
    b_w, w, num_rows, ys, scales, out, out_b, P,
    ADD: tl.constexpr, B: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] (+)= (w[r] . y) * scale over this program's rows; `b_w` is its first tile."""
    for tile in range(tl.cdiv(num_rows, P * R)):
        following = _load_tile(w, tile + 1, num_rows, P, R, K, BK)
        r = program_rows(tile, P, R)
        for b in tl.static_range(B):
            result = tl.sum(b_w.to(tl.float32) * ys[b][None, :], 1) * scales[b]
            if ADD:
                result += tl.load(out + b * out_b + r, mask=r < num_rows, other=0.0)
            tl.store(out + b * out_b + r, result, mask=r < num_rows)
        b_w = following


@triton.jit
def _gated_matvec(
    b_w, b_gate, w, w_gate, num_rows, ys, scales, out, out_b, P,
    SILU: tl.constexpr, B: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] = act(w[r] . y * scale) * (w_gate[r] . y * scale)."""
    for tile in range(tl.cdiv(num_rows, P * R)):
        following = _load_tile(w, tile + 1, num_rows, P, R, K, BK)
        following_gate = _load_tile(w_gate, tile + 1, num_rows, P, R, K, BK)
        r = program_rows(tile, P, R)
        for b in tl.static_range(B):
            up = tl.sum(b_w.to(tl.float32) * ys[b][None, :], 1) * scales[b]
            if SILU:
                up = silu(up)
            gated = up * (tl.sum(b_gate.to(tl.float32) * ys[b][None, :], 1) * scales[b])
            tl.store(out + b * out_b + r, gated, mask=r < num_rows)
        b_w, b_gate = following, following_gate


@triton.jit
def _embed(tokens, embedding, x, scale, P, B: tl.constexpr, M: tl.constexpr, R: tl.constexpr):
    r = program_rows(0, P, R)
    for b in tl.static_range(B):
        b_x = tl.load(embedding + tl.load(tokens + b) * M + r, mask=r < M, other=0.0)
        tl.store(x + b * M + r, b_x.to(tl.float32) * scale, mask=r < M)


@triton.jit
def _state_tile(p_state, item, key_width, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Addresses [BD, BE] in the state [B, H, key_width, D] of (row, head, BE columns) number `item`."""
    d, e = tl.arange(0, BD), (item % (D // BE)) * BE + tl.arange(0, BE)
    return p_state + item // (D // BE) * key_width * D + d[:, None] * D + e[None, :]


@triton.jit
def _decode_wide_kernel(
    tokens, position, embedding, head, log_decay, table, x, qkvu, o, h, logits, counter,
    num_layers, H, V, P, scale, eps,
    B: tl.constexpr, M: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    R_EMBED: tl.constexpr, R_OUT: tl.constexpr, R_QKVU: tl.constexpr, R_UP: tl.constexpr, R_DOWN: tl.constexpr,
    SILU: tl.constexpr, SILU_VALUE: tl.constexpr, SILU_GLU: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Grid (P,), all resident at once. `DecodeModel` and `WideDecodeStep` say what the arguments are.

    x [B, M] is the residual stream; qkvu [B, 4M], o [B, M] and h [B, F] the results of the phases, all fp32. `counter` is
    0 at the start and at the end.
    """
    DTYPE: tl.constexpr = embedding.dtype.element_ty
    pid = tl.program_id(0)
    arrivals = P
    _embed(tokens, embedding, x, scale, P, B, M, R_EMBED)
    _arrive(counter)

    for layer in range(num_layers):
        w = load_pointer(table, layer, QKVU, DTYPE)
        b_w = _load_tile(w, 0, 4 * M, P, R_QKVU, M, BM)
        _prefetch_tile(w, 1, 4 * M, P, R_QKVU, M, PREFETCH)
        _wait(counter, arrivals)
        ys, scales = _load_inputs(x, M, None, 0, eps, True, B, M, BM)
        _matvec(b_w, w, 4 * M, ys, scales, qkvu, 4 * M, P, False, B, R_QKVU, M, BM)
        _arrive(counter)
        arrivals += P

        p_state = load_pointer(table, layer, STATE, tl.float32)
        theta = tl.load(table + layer * NUM_COLUMNS + THETA)
        key_width = D
        if theta != 0:
            key_width = 2 * D
        d = tl.arange(0, BD)
        m_d = (d < D)[:, None]
        items = B * H * (D // BE)
        # A program's next state tile is loaded one item ahead. Past the last item the mask is empty: d is pushed beyond D.
        m_s = (d + BD * tl.maximum(pid + 1 - items, 0) < D)[:, None]
        b_s = tl.load(_state_tile(p_state, pid, key_width, D, BD, BE), mask=m_s, other=0.0)
        w = load_pointer(table, layer, OUT, DTYPE)
        _prefetch_tile(w, 1, M, P, R_OUT, M, PREFETCH)
        _wait(counter, arrivals)
        for item in range(pid, items, P):
            row, head_of = item // (D // BE) // H, item // (D // BE) % H
            e = (item % (D // BE)) * BE + tl.arange(0, BE)
            p_q = qkvu + row * 4 * M + head_of * D
            q = tl.load(p_q + d, mask=d < D, other=0.0)
            k = tl.load(p_q + M + d, mask=d < D, other=0.0)
            v = tl.load(p_q + 2 * M + e)
            if SILU:
                q, k = silu(q), silu(k)
            if SILU_VALUE:
                v = silu(v)
            decay_minus_one = exp_minus_one(tl.load(log_decay + layer * H + head_of))
            p_s = _state_tile(p_state, item, key_width, D, BD, BE)
            b_s, q, b_o = update_state(b_s, p_s, q, k, v, decay_minus_one, theta, position, row, head_of, D, BD, BE)
            tl.store(p_s, b_s, mask=m_d)
            tl.store(o + row * M + head_of * D + e, b_o + tl.sum(q[:, None] * b_s, 0))
            m_s = (d + BD * tl.maximum(item + P + 1 - items, 0) < D)[:, None]
            b_s = tl.load(_state_tile(p_state, item + P, key_width, D, BD, BE), mask=m_s, other=0.0)
        _arrive(counter)
        arrivals += P

        b_w = _load_tile(w, 0, M, P, R_OUT, M, BM)
        _wait(counter, arrivals)
        ys, scales = _load_inputs(o, M, qkvu + 3 * M, 4 * M, eps, True, B, M, BM)
        _matvec(b_w, w, M, ys, scales, x, M, P, True, B, R_OUT, M, BM)
        _arrive(counter)
        arrivals += P

        w, w_gate = load_pointer(table, layer, UP, DTYPE), load_pointer(table, layer, GATE, DTYPE)
        b_w = _load_tile(w, 0, F, P, R_UP, M, BM)
        b_gate = _load_tile(w_gate, 0, F, P, R_UP, M, BM)
        _prefetch_tile(w, 1, F, P, R_UP, M, PREFETCH)
        _prefetch_tile(w_gate, 1, F, P, R_UP, M, PREFETCH)
        _wait(counter, arrivals)
        ys, scales = _load_inputs(x, M, None, 0, eps, True, B, M, BM)
        _gated_matvec(b_w, b_gate, w, w_gate, F, ys, scales, h, F, P, SILU_GLU, B, R_UP, M, BM)
        _arrive(counter)
        arrivals += P

        w = load_pointer(table, layer, DOWN, DTYPE)
        b_w = _load_tile(w, 0, M, P, R_DOWN, F, BF)
        _prefetch_tile(w, 1, M, P, R_DOWN, F, PREFETCH)
        _wait(counter, arrivals)
        ys, scales = _load_inputs(h, F, None, 0, eps, False, B, F, BF)
        _matvec(b_w, w, M, ys, scales, x, M, P, True, B, R_DOWN, F, BF)
        _arrive(counter)
        arrivals += P

    b_w = _load_tile(head, 0, V, P, R_QKVU, M, BM)
    _prefetch_tile(head, 1, V, P, R_QKVU, M, PREFETCH)
    _wait(counter, arrivals)
    ys, scales = _load_inputs(x, M, None, 0, eps, True, B, M, BM)
    _matvec(b_w, head, V, ys, scales, logits, V, P, False, B, R_QKVU, M, BM)
    # No program waits any more: the last to arrive resets the counter for the next step.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals + P - 1:
        tl.atomic_xchg(counter, 0)
        for b in tl.static_range(B):
            tl.store(position + b, tl.load(position + b) + 1)


class WideDecodeStep:
    """`step()` reads `tokens` [B] and writes `logits` [B, V]; it advances every state and `position` in place.

    After it `tokens` is the argmax of each row over the first `num_choices` ids, `top_logit` [B] its logit.
    """

    def __init__(self, model: DecodeModel) -> None:
        self.model, device = model, model.head.device
        B, V, M, F, H, D = model.sizes
        P = num_programs(device)
        self.tokens, self.logits, self.top_logit = model.outputs()
        vectors = [torch.zeros(B, width, dtype=torch.float32, device=device) for width in (M, 4 * M, M, F)]
        self._grid = (P,)
        self._arguments = (
            self.tokens, model.position, model.embedding, model.head, model.log_decay,
            torch.tensor(model.address_table(), device=device), *vectors, self.logits,
            torch.zeros(1, dtype=torch.int32, device=device), len(model.layers), H, V, P, model.scale, model.eps,
        )  # fmt: skip
        power = triton.next_power_of_2
        # Rows of M elements that a program owns, and that fit into a tile.
        owned, fitting = power(triton.cdiv(M, P)), max(1, _TILE // power(M))
        self._sizes = {
            "B": B, "M": M, "F": F, "D": D, "BM": power(M), "BF": power(F), "BD": power(D), "BE": 8,
            "R_EMBED": owned, "R_OUT": min(owned, fitting), "R_QKVU": fitting, "R_UP": max(1, fitting // 2),
            "R_DOWN": min(owned, max(1, _TILE // power(F))),
            "SILU": model.silu[0], "SILU_VALUE": model.silu[1], "SILU_GLU": model.silu[2],
            # Quarters of a row must be multiples of 16 bytes.
            "PREFETCH": model.prefetches(alignment=64),
        }  # fmt: skip

    def __call__(self) -> None:
        options = launch_options(self.tokens.device)
        _decode_wide_kernel[self._grid](*self._arguments, **self._sizes, num_warps=_NUM_WARPS, num_stages=1, **options)
        torch.argmax(self.logits[:, : self.model.num_choices], dim=-1, out=self.tokens)
        torch.gather(self.logits, 1, self.tokens[:, None], out=self.top_logit[:, None])
