"""One decoding step of the whole model in one persistent Triton kernel, for batches so small that launches dominate.

A small batch reads every weight once per token: 0.2 ms at 385M. Launched as hundreds of kernels, most of the time goes
into starting and draining them. Here one program per multiprocessor stays for the whole step. Program p of P owns the
rows r = p mod P of every matrix, and all wait for each other where a vector must be complete:

    embed | q k v u = W y | state, o | x += W_o (norm(o) * u) | h = (W_1 y) * (W_2 y) | x += W_3 h | ... | logits

Weights do not depend on activations, so a program asks for its first tile of the next matrix before it waits: the memory
bus stays busy meanwhile. The vectors between the phases live in the L2 cache, in the weights' dtype, which gives them the
weights' layout among threads; the residual stream x is fp32 and has a copy y in that dtype.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a weight tile: 64 KiB of bf16, 256 bytes a thread, so that one is on its way while another is used.
_TILE = 32768
_NUM_WARPS = 8
# Columns that one warp reads at once, 8 elements a thread.
_SPAN = 256
SPAN = tl.constexpr(_SPAN)
# Beyond this many rows tensor cores do the products better.
MAX_BATCH = 8
# Columns of the table of addresses, which has a row for each layer.
QKVU, OUT, UP, GATE, DOWN, STATE, THETA, NUM_COLUMNS = (tl.constexpr(column) for column in range(8))


@triton.jit
def _arrive(counter):
    """What this program has stored is visible to whoever sees the count."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, target):
    """Until `target` arrivals were counted."""
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@triton.jit
def _address(table, layer, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.multiple_of(tl.load(table + layer * NUM_COLUMNS + COLUMN).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _rows(tile, P, RR: tl.constexpr, W: tl.constexpr):
    """[RR, W]: the rows of tile number `tile` of this program; column w is warp w's."""
    return tl.program_id(0) + P * ((tile * RR + tl.arange(0, RR)[:, None]) * W + tl.arange(0, W)[None, :])


# Tiles are [spans of columns, rows of a warp, warps, columns of a span]. A warp then holds whole rows, so a product needs
# no word from another warp: each thread adds up its spans, and the last sum runs over the threads of the warp.


@triton.jit
def _tile(w, tile, part, num_rows, P, RR: tl.constexpr, W: tl.constexpr, K: tl.constexpr, SPANS: tl.constexpr):
    """[SPANS, RR, W, SPAN] of a [num_rows, K] matrix, in its dtype: part number `part` of its columns."""
    r = _rows(tile, P, RR, W)[None, :, :, None]
    spans = part * SPANS + tl.arange(0, SPANS)
    k = spans[:, None, None, None] * SPAN + tl.arange(0, SPAN)[None, None, None, :]
    return tl.load(w + r.to(tl.int64) * K + k, mask=(r < num_rows) & (k < K), other=0.0, eviction_policy="evict_first")


@triton.jit
def _vector(x, part, W: tl.constexpr, K: tl.constexpr, SPANS: tl.constexpr):
    """[SPANS, W, SPAN] fp32: a part of a vector [K], once for each warp."""
    spans = part * SPANS + tl.arange(0, SPANS)
    k = spans[:, None, None] * SPAN + tl.arange(0, SPAN)[None, None, :] + 0 * tl.arange(0, W)[None, :, None]
    return tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _dot(b_w, y):
    """[RR, W]: the rows of a tile times a vector."""
    return tl.sum(tl.sum(b_w.to(tl.float32) * y[:, None, :, :], 0), 2)


@triton.jit
def _squares(x):
    """[1, W]: the sum of squares of a vector. A norm's factor is a scalar, so it may wait until after the product."""
    return tl.sum(tl.sum(x * x, 0), 1)[None, :]


@triton.jit
def _product(
    b_w, w, num_rows, B, x, gate, gate_b, out, out_b, copy, eps, P,
    NORM: tl.constexpr, ADD: tl.constexpr, RR: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    SPANS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[r] (+)= w[r] . (norm(x) * gate) over this program's rows, x [B, K]; `b_w` is its first tile.

    ADD: `out` is the residual stream and `copy` its low-precision copy. More than one part only where B is 1.
    """
    for tile in range(tl.cdiv(num_rows, P * RR * W)):
        r = _rows(tile, P, RR, W)
        result = tl.zeros([RR, W], tl.float32)
        squares = tl.zeros([1, W], tl.float32)
        for part in tl.static_range(PARTS):
            following = _tile(w, tile + (part + 1) // PARTS, (part + 1) % PARTS, num_rows, P, RR, W, K, SPANS)
            for b in range(B):
                if part == 0:
                    result = tl.zeros([RR, W], tl.float32)
                    squares = tl.zeros([1, W], tl.float32)
                y = _vector(x + b * K, part, W, K, SPANS)
                if NORM:
                    squares += _squares(y)
                if gate is not None:
                    y *= _vector(gate + b * gate_b, part, W, K, SPANS)
                result += _dot(b_w, y)
                if part == PARTS - 1:
                    if NORM:
                        result *= tl.rsqrt(squares / K + eps)
                    if ADD:
                        result += tl.load(out + b * out_b + r, mask=r < num_rows, other=0.0)
                        tl.store(copy + b * out_b + r, result.to(copy.dtype.element_ty), mask=r < num_rows)
                    tl.store(out + b * out_b + r, result.to(out.dtype.element_ty), mask=r < num_rows)
            b_w = following


@triton.jit
def _gated_product(
    b_w, b_gate, w, w_gate, num_rows, B, x, out, out_b, eps, P,
    SILU: tl.constexpr, RR: tl.constexpr, W: tl.constexpr, K: tl.constexpr, SPANS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[r] = act(w[r] . y) * (w_gate[r] . y) with y = norm(x)."""
    for tile in range(tl.cdiv(num_rows, P * RR * W)):
        r = _rows(tile, P, RR, W)
        up = tl.zeros([RR, W], tl.float32)
        gate = tl.zeros([RR, W], tl.float32)
        squares = tl.zeros([1, W], tl.float32)
        for part in tl.static_range(PARTS):
            tile_next, part_next = tile + (part + 1) // PARTS, (part + 1) % PARTS
            following = _tile(w, tile_next, part_next, num_rows, P, RR, W, K, SPANS)
            following_gate = _tile(w_gate, tile_next, part_next, num_rows, P, RR, W, K, SPANS)
            for b in range(B):
                if part == 0:
                    up = tl.zeros([RR, W], tl.float32)
                    gate = tl.zeros([RR, W], tl.float32)
                    squares = tl.zeros([1, W], tl.float32)
                y = _vector(x + b * K, part, W, K, SPANS)
                squares += _squares(y)
                up += _dot(b_w, y)
                gate += _dot(b_gate, y)
                if part == PARTS - 1:
                    root = tl.rsqrt(squares / K + eps)
                    up *= root
                    if SILU:
                        up = _silu(up)
                    tl.store(out + b * out_b + r, (up * gate * root).to(out.dtype.element_ty), mask=r < num_rows)
            b_w, b_gate = following, following_gate


@triton.jit
def _embed(tokens, embedding, x, y, scale, B, P, M: tl.constexpr, OWNED: tl.constexpr):
    r = tl.program_id(0) + P * tl.arange(0, OWNED)
    for b in range(B):
        b_x = tl.load(embedding + tl.load(tokens + b) * M + r, mask=r < M, other=0.0).to(tl.float32) * scale
        tl.store(x + b * M + r, b_x, mask=r < M)
        tl.store(y + b * M + r, b_x.to(y.dtype.element_ty), mask=r < M)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _state_tile(p_state, item, key_width, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Addresses [BD, BE] in the state [B, H, key_width, D] of (row, head, columns) number `item`."""
    d, e = tl.arange(0, BD), (item % (D // BE)) * BE + tl.arange(0, BE)
    return p_state + item // (D // BE) * key_width * D + d[:, None] * D + e[None, :]


@triton.jit
def _decode_kernel(
    tokens, position, embedding, head, log_decay, table, x, y, qkvu, o, h, logits, counter,
    B, num_layers, H, V, P, scale, eps,
    M: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, W: tl.constexpr, OWNED: tl.constexpr,
    RM: tl.constexpr, SM: tl.constexpr, PM: tl.constexpr, RO: tl.constexpr,
    RU: tl.constexpr, SU: tl.constexpr, PU: tl.constexpr, RF: tl.constexpr, SF: tl.constexpr, PF: tl.constexpr,
    SILU: tl.constexpr, SILU_VALUE: tl.constexpr, SILU_GLU: tl.constexpr,
):  # fmt: skip
    """Grid (P,), all resident at once; `DecodeStep` says what the arguments are."""
    DTYPE: tl.constexpr = embedding.dtype.element_ty
    pid = tl.program_id(0)
    arrivals = P
    _embed(tokens, embedding, x, y, scale, B, P, M, OWNED)
    _arrive(counter)

    for layer in range(num_layers):
        w = _address(table, layer, QKVU, DTYPE)
        b_w = _tile(w, 0, 0, 4 * M, P, RM, W, M, SM)
        _wait(counter, arrivals)
        _product(b_w, w, 4 * M, B, y, None, 0, qkvu, 4 * M, None, eps, P, True, False, RM, W, M, SM, PM)
        _arrive(counter)
        arrivals += P

        p_state = _address(table, layer, STATE, tl.float32)
        theta = tl.load(table + layer * NUM_COLUMNS + THETA)
        key_width = D
        if theta != 0:
            key_width = 2 * D
        d = tl.arange(0, BD)
        m_d = (d < D)[:, None]
        items = B * H * (D // BE)
        # Past the last item nothing is read: its rows are pushed beyond D.
        m_s = (d + BD * tl.maximum(pid + 1 - items, 0) < D)[:, None]
        b_s = tl.load(_state_tile(p_state, pid, key_width, D, BD, BE), mask=m_s, other=0.0)
        _wait(counter, arrivals)
        for item in range(pid, items, P):
            row, head_of = item // (D // BE) // H, item // (D // BE) % H
            e = (item % (D // BE)) * BE + tl.arange(0, BE)
            p_q = qkvu + row * 4 * M + head_of * D
            q = tl.load(p_q + d, mask=d < D, other=0.0).to(tl.float32)
            k = tl.load(p_q + M + d, mask=d < D, other=0.0).to(tl.float32)
            v = tl.load(p_q + 2 * M + e).to(tl.float32)
            if SILU:
                q, k = _silu(q), _silu(k)
            if SILU_VALUE:
                v = _silu(v)
            decay = tl.exp(tl.load(log_decay + layer * H + head_of))
            p_s = _state_tile(p_state, item, key_width, D, BD, BE)
            if theta != 0:
                # LRPE doubles q and k; the angle is reduced to one turn in float64, as positions reach 10^6.
                p_theta = theta.to(tl.pointer_type(tl.float32)) + head_of * D + d
                turns = tl.load(p_theta, mask=d < D, other=0.0).to(tl.float64) * 0.15915494309189535
                turns *= tl.load(position + row).to(tl.float64)
                angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
                b_t = tl.load(p_s + D * D, mask=m_d, other=0.0)
                b_t = decay * b_t + (k * tl.sin(angle))[:, None] * v[None, :]
                tl.store(p_s + D * D, b_t, mask=m_d)
                b_o = tl.sum((q * tl.sin(angle))[:, None] * b_t, 0)
                q, k = q * tl.cos(angle), k * tl.cos(angle)
            else:
                b_o = tl.zeros([BE], tl.float32)
            b_s = decay * b_s + k[:, None] * v[None, :]
            tl.store(p_s, b_s, mask=m_d)
            b_o += tl.sum(q[:, None] * b_s, 0)
            tl.store(o + row * M + head_of * D + e, b_o.to(o.dtype.element_ty))
            m_s = (d + BD * tl.maximum(item + P + 1 - items, 0) < D)[:, None]
            b_s = tl.load(_state_tile(p_state, item + P, key_width, D, BD, BE), mask=m_s, other=0.0)
        _arrive(counter)
        arrivals += P

        w = _address(table, layer, OUT, DTYPE)
        b_w = _tile(w, 0, 0, M, P, RO, W, M, SM)
        _wait(counter, arrivals)
        _product(b_w, w, M, B, o, qkvu + 3 * M, 4 * M, x, M, y, eps, P, True, True, RO, W, M, SM, PM)
        _arrive(counter)
        arrivals += P

        w, w_gate = _address(table, layer, UP, DTYPE), _address(table, layer, GATE, DTYPE)
        b_w = _tile(w, 0, 0, F, P, RU, W, M, SU)
        b_gate = _tile(w_gate, 0, 0, F, P, RU, W, M, SU)
        _wait(counter, arrivals)
        _gated_product(b_w, b_gate, w, w_gate, F, B, y, h, F, eps, P, SILU_GLU, RU, W, M, SU, PU)
        _arrive(counter)
        arrivals += P

        w = _address(table, layer, DOWN, DTYPE)
        b_w = _tile(w, 0, 0, M, P, RF, W, F, SF)
        _wait(counter, arrivals)
        _product(b_w, w, M, B, h, None, 0, x, M, y, eps, P, False, True, RF, W, F, SF, PF)
        _arrive(counter)
        arrivals += P

    b_w = _tile(head, 0, 0, V, P, RM, W, M, SM)
    _wait(counter, arrivals)
    _product(b_w, head, V, B, y, None, 0, logits, V, None, eps, P, True, False, RM, W, M, SM, PM)
    # Nobody waits any more: the last to arrive makes the counter ready for the next step.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals + P - 1:
        tl.atomic_xchg(counter, 0)
        for b in range(B):
            tl.store(position + b, tl.load(position + b) + 1)


def _cut(columns: int, elements: int) -> tuple[int, int, int]:
    """Rows of a warp, spans and parts that cut a matrix of so many columns into tiles of at most `elements`."""
    total, most = triton.cdiv(columns, _SPAN), elements // (_SPAN * _NUM_WARPS)
    spans = min(triton.next_power_of_2(total), most)
    return most // spans, spans, triton.cdiv(total, spans)


def max_batch(model_dim: int, glu_dim: int) -> int:
    """Rows that one kernel decodes at once: more than one only where a warp holds whole rows of every matrix."""
    parts = max(_cut(model_dim, _TILE // 2)[2], _cut(glu_dim, _TILE)[2])
    return MAX_BATCH if parts == 1 else 1


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, [out, in], contiguous, of one dtype; its state [B, H, D or 2D, D] fp32; theta [H, 1, D]."""

    qkvu: Tensor
    out: Tensor
    up: Tensor
    gate: Tensor
    down: Tensor
    state: Tensor
    theta: Tensor | None


class DecodeStep:
    """`step()` reads `tokens`, writes `logits` and moves every state and `position` on, all in place.

    embedding and head [V, M] in the weights' dtype (bf16, fp16 or fp32); log_decay [L, H] fp32; position [B] int64.
    `scale` multiplies the embedding. The tensors must stay where they are.
    """

    def __init__(
        self,
        layers: list[Layer],
        embedding: Tensor,
        head: Tensor,
        log_decay: Tensor,
        position: Tensor,
        scale: float,
        eps: float,
        silu: tuple[bool, bool, bool],
    ) -> None:
        """`silu`: whether q and k, v, and the first half of the channel mixer go through SiLU."""
        device = embedding.device
        (V, M), F = head.shape, layers[0].up.shape[0]
        B, H, _, D = layers[0].state.shape
        self.programs = torch.cuda.get_device_properties(device).multi_processor_count if embedding.is_cuda else 1
        self.tokens = torch.zeros(B, dtype=torch.int64, device=device)
        self.logits = torch.zeros(B, V, dtype=torch.float32, device=device)
        self._tensors = [layers, embedding, head]  # the table below holds bare addresses
        rows = [
            [x.data_ptr() for x in (part.qkvu, part.out, part.up, part.gate, part.down, part.state)]
            + [0 if part.theta is None else part.theta.data_ptr()]
            for part in layers
        ]
        x = torch.zeros(B, M, dtype=torch.float32, device=device)
        vectors = [torch.zeros(B, width, dtype=embedding.dtype, device=device) for width in (M, 4 * M, M, F)]
        self._arguments = (
            self.tokens, position, embedding, head, log_decay.contiguous(), torch.tensor(rows, device=device), x, *vectors,
            self.logits, torch.zeros(1, dtype=torch.int32, device=device),
            B, len(layers), H, V, self.programs, scale, eps,
        )  # fmt: skip
        owned = triton.next_power_of_2(triton.cdiv(M, self.programs))
        few = max(1, owned // _NUM_WARPS)  # rows of a warp in the shortest matrices: more would only be masked
        (rm, sm, pm), (ru, su, pu), (rf, sf, pf) = _cut(M, _TILE), _cut(M, _TILE // 2), _cut(F, _TILE)
        self._sizes = {
            "M": M, "F": F, "D": D, "BD": triton.next_power_of_2(D), "BE": 8, "W": _NUM_WARPS, "OWNED": owned,
            "RM": rm, "SM": sm, "PM": pm, "RO": min(rm, few), "RU": ru, "SU": su, "PU": pu,
            "RF": min(rf, few), "SF": sf, "PF": pf,
            "SILU": silu[0], "SILU_VALUE": silu[1], "SILU_GLU": silu[2],
        }  # fmt: skip

    def __call__(self) -> None:
        """One step. The programs wait for each other, so all must fit on the GPU at once: the launch says if not."""
        more = {"launch_cooperative_grid": True} if self.tokens.is_cuda else {}
        _decode_kernel[(self.programs,)](*self._arguments, **self._sizes, num_warps=_NUM_WARPS, num_stages=1, **more)
