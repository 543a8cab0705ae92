"""One decoding step of the whole model in one persistent Triton kernel, for batches so small that launches dominate.

A small batch reads every weight once per token: 0.2 ms at 385M. Launched as hundreds of kernels, most of the time goes
into starting and draining them. Here one program per multiprocessor stays for the whole step. Program p of P owns the
rows r = p mod P of every matrix, and all wait for each other where a vector must be complete:

    embed | q k v u = W y | state, o | x += W_o (norm(o) * u) | h = (W_1 y) * (W_2 y) | x += W_3 h | ... | logits

Weights do not depend on activations, so a program loads its first tile of the next matrix before it waits, and has the
second-level cache read the one after: the memory bus stays busy meanwhile. The vectors between the phases are fp32 and
live in that cache; a phase reads its vector into registers once, and its norm scales the products rather than the vector.
Narrower models have a faster one, `decode_rows.py`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a weight tile: 64 KiB of bf16, 256 bytes a thread, so that one can be on its way while another is used. On an
# H100 a step of 7B took 5.14 ms, with tiles half as large 5.51, as a graph of the model's kernels 5.88.
_TILE = 32768
_NUM_WARPS = 8
# Every further row repeats each tile's sum over all warps: four rows took 1.26 ms at 385M, as long as the model's kernels.
MAX_BATCH = 1
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
def _rows(tile, P, R: tl.constexpr):
    """The rows of tile number `tile` of this program."""
    return tl.program_id(0) + P * (tile * R + tl.arange(0, R))


@triton.jit
def _tile(w, tile, num_rows, P, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """[R, BK] of a [num_rows, K] matrix, in its dtype."""
    r, k = _rows(tile, P, R), tl.arange(0, BK)
    p_w = w + r.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(p_w, mask=(r < num_rows)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _prefetch(p, size, wanted):
    """Has the second-level cache read `size` bytes from p on, where `wanted`. This does not queue with loads."""
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.s32 wanted, $2, 0; "
        "@wanted cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [p, wanted.to(tl.int32), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _ask(w, tile, num_rows, P, R: tl.constexpr, K: tl.constexpr, ASK: tl.constexpr):
    """With ASK, has the second-level cache read a tile, a row in four pieces."""
    if ASK:
        r, lane = _rows(tile, P, R), tl.arange(0, 32)[None, :]
        PIECE: tl.constexpr = K // 4
        p_w = (w + r.to(tl.int64) * K)[:, None] + lane // 8 * PIECE
        size = PIECE * (w.dtype.element_ty.primitive_bitwidth // 8)
        _prefetch(p_w, size, (r < num_rows)[:, None] & (lane % 8 == 0))


@triton.jit
def _vector(x, K: tl.constexpr, BK: tl.constexpr):
    k = tl.arange(0, BK)
    return tl.load(x + k, mask=k < K, other=0.0)


@triton.jit
def _vectors(x, x_b, gate, gate_b, eps, NORM: tl.constexpr, B: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """For each row of the batch y = x (* gate), and the factor of products with it: with NORM 1 / sqrt(mean(x^2) + eps)."""
    ys, scales = (), ()
    for b in tl.static_range(B):
        y = _vector(x + b * x_b, K, BK)
        scale = tl.rsqrt(tl.sum(y * y, 0) / K + eps) if NORM else tl.full([], 1.0, tl.float32)
        if gate is not None:
            y *= _vector(gate + b * gate_b, K, BK)
        ys = ys + (y,)
        scales = scales + (scale,)
    return ys, scales


@triton.jit
def _product(
    b_w, w, num_rows, ys, scales, out, out_b, P,
    ADD: tl.constexpr, B: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] (+)= (w[r] . y) * scale over this program's rows; `b_w` is its first tile."""
    for tile in range(tl.cdiv(num_rows, P * R)):
        following = _tile(w, tile + 1, num_rows, P, R, K, BK)
        r = _rows(tile, P, R)
        for b in tl.static_range(B):
            result = tl.sum(b_w.to(tl.float32) * ys[b][None, :], 1) * scales[b]
            if ADD:
                result += tl.load(out + b * out_b + r, mask=r < num_rows, other=0.0)
            tl.store(out + b * out_b + r, result, mask=r < num_rows)
        b_w = following


@triton.jit
def _gated_product(
    b_w, b_gate, w, w_gate, num_rows, ys, scales, out, out_b, P,
    SILU: tl.constexpr, B: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[r] = act(w[r] . y * scale) * (w_gate[r] . y * scale)."""
    for tile in range(tl.cdiv(num_rows, P * R)):
        following = _tile(w, tile + 1, num_rows, P, R, K, BK)
        following_gate = _tile(w_gate, tile + 1, num_rows, P, R, K, BK)
        r = _rows(tile, P, R)
        for b in tl.static_range(B):
            up = tl.sum(b_w.to(tl.float32) * ys[b][None, :], 1) * scales[b]
            if SILU:
                up = _silu(up)
            gated = up * (tl.sum(b_gate.to(tl.float32) * ys[b][None, :], 1) * scales[b])
            tl.store(out + b * out_b + r, gated, mask=r < num_rows)
        b_w, b_gate = following, following_gate


@triton.jit
def _embed(tokens, embedding, x, scale, P, B: tl.constexpr, M: tl.constexpr, R: tl.constexpr):
    r = _rows(0, P, R)
    for b in tl.static_range(B):
        b_x = tl.load(embedding + tl.load(tokens + b) * M + r, mask=r < M, other=0.0)
        tl.store(x + b * M + r, b_x.to(tl.float32) * scale, mask=r < M)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _decay_less_one(g):
    """exp(g) - 1: float32 cannot tell the slowest decays (1 - 4e-8) from their neighbours; see `chunk_step`."""
    return tl.where(g > -0.01, g * (1.0 + g * (0.5 + g * 0.16666667)), tl.exp(g) - 1.0)


@triton.jit
def _state_tile(p_state, item, key_width, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Addresses [BD, BE] in the state [B, H, key_width, D] of (row, head, columns) number `item`."""
    d, e = tl.arange(0, BD), (item % (D // BE)) * BE + tl.arange(0, BE)
    return p_state + item // (D // BE) * key_width * D + d[:, None] * D + e[None, :]


@triton.jit
def _decode_kernel(
    tokens, position, embedding, head, log_decay, table, x, qkvu, o, h, logits, counter,
    num_layers, H, V, P, scale, eps,
    B: tl.constexpr, M: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    RX: tl.constexpr, RO: tl.constexpr, RM: tl.constexpr, RU: tl.constexpr, RF: tl.constexpr,
    SILU: tl.constexpr, SILU_VALUE: tl.constexpr, SILU_GLU: tl.constexpr, ASK: tl.constexpr,
):  # fmt: skip
    """Grid (P,), all resident at once; `DecodeStep` says what the arguments are."""
    DTYPE: tl.constexpr = embedding.dtype.element_ty
    pid = tl.program_id(0)
    arrivals = P
    _embed(tokens, embedding, x, scale, P, B, M, RX)
    _arrive(counter)

    for layer in range(num_layers):
        w = _address(table, layer, QKVU, DTYPE)
        b_w = _tile(w, 0, 4 * M, P, RM, M, BM)
        _ask(w, 1, 4 * M, P, RM, M, ASK)
        _wait(counter, arrivals)
        ys, scales = _vectors(x, M, None, 0, eps, True, B, M, BM)
        _product(b_w, w, 4 * M, ys, scales, qkvu, 4 * M, P, False, B, RM, M, BM)
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
        w = _address(table, layer, OUT, DTYPE)
        _ask(w, 1, M, P, RO, M, ASK)
        _wait(counter, arrivals)
        for item in range(pid, items, P):
            row, head_of = item // (D // BE) // H, item // (D // BE) % H
            e = (item % (D // BE)) * BE + tl.arange(0, BE)
            p_q = qkvu + row * 4 * M + head_of * D
            q = tl.load(p_q + d, mask=d < D, other=0.0)
            k = tl.load(p_q + M + d, mask=d < D, other=0.0)
            v = tl.load(p_q + 2 * M + e)
            if SILU:
                q, k = _silu(q), _silu(k)
            if SILU_VALUE:
                v = _silu(v)
            loss = _decay_less_one(tl.load(log_decay + layer * H + head_of))
            p_s = _state_tile(p_state, item, key_width, D, BD, BE)
            if theta != 0:
                # LRPE doubles q and k; the angle is reduced to one turn in float64, as positions reach 10^6.
                p_theta = theta.to(tl.pointer_type(tl.float32)) + head_of * D + d
                turns = tl.load(p_theta, mask=d < D, other=0.0).to(tl.float64) * 0.15915494309189535
                turns *= tl.load(position + row).to(tl.float64)
                angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
                b_t = tl.load(p_s + D * D, mask=m_d, other=0.0)
                b_t += loss * b_t + (k * tl.sin(angle))[:, None] * v[None, :]
                tl.store(p_s + D * D, b_t, mask=m_d)
                b_o = tl.sum((q * tl.sin(angle))[:, None] * b_t, 0)
                q, k = q * tl.cos(angle), k * tl.cos(angle)
            else:
                b_o = tl.zeros([BE], tl.float32)
            b_s += loss * b_s + k[:, None] * v[None, :]
            tl.store(p_s, b_s, mask=m_d)
            tl.store(o + row * M + head_of * D + e, b_o + tl.sum(q[:, None] * b_s, 0))
            m_s = (d + BD * tl.maximum(item + P + 1 - items, 0) < D)[:, None]
            b_s = tl.load(_state_tile(p_state, item + P, key_width, D, BD, BE), mask=m_s, other=0.0)
        _arrive(counter)
        arrivals += P

        b_w = _tile(w, 0, M, P, RO, M, BM)
        _wait(counter, arrivals)
        ys, scales = _vectors(o, M, qkvu + 3 * M, 4 * M, eps, True, B, M, BM)
        _product(b_w, w, M, ys, scales, x, M, P, True, B, RO, M, BM)
        _arrive(counter)
        arrivals += P

        w, w_gate = _address(table, layer, UP, DTYPE), _address(table, layer, GATE, DTYPE)
        b_w = _tile(w, 0, F, P, RU, M, BM)
        b_gate = _tile(w_gate, 0, F, P, RU, M, BM)
        _ask(w, 1, F, P, RU, M, ASK)
        _ask(w_gate, 1, F, P, RU, M, ASK)
        _wait(counter, arrivals)
        ys, scales = _vectors(x, M, None, 0, eps, True, B, M, BM)
        _gated_product(b_w, b_gate, w, w_gate, F, ys, scales, h, F, P, SILU_GLU, B, RU, M, BM)
        _arrive(counter)
        arrivals += P

        w = _address(table, layer, DOWN, DTYPE)
        b_w = _tile(w, 0, M, P, RF, F, BF)
        _ask(w, 1, M, P, RF, F, ASK)
        _wait(counter, arrivals)
        ys, scales = _vectors(h, F, None, 0, eps, False, B, F, BF)
        _product(b_w, w, M, ys, scales, x, M, P, True, B, RF, F, BF)
        _arrive(counter)
        arrivals += P

    b_w = _tile(head, 0, V, P, RM, M, BM)
    _ask(head, 1, V, P, RM, M, ASK)
    _wait(counter, arrivals)
    ys, scales = _vectors(x, M, None, 0, eps, True, B, M, BM)
    _product(b_w, head, V, ys, scales, logits, V, P, False, B, RM, M, BM)
    # Nobody waits any more: the last to arrive makes the counter ready for the next step.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == arrivals + P - 1:
        tl.atomic_xchg(counter, 0)
        for b in tl.static_range(B):
            tl.store(position + b, tl.load(position + b) + 1)


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


def addresses(layers: list[Layer]) -> list[list[int]]:
    """The table of addresses, a row for each layer."""
    return [
        [x.data_ptr() for x in (part.qkvu, part.out, part.up, part.gate, part.down, part.state)]
        + [0 if part.theta is None else part.theta.data_ptr()]
        for part in layers
    ]


def num_programs(device: torch.device) -> int:
    """One for each multiprocessor; on a CPU, for Triton's interpreter, a single one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def can_ask(device: torch.device) -> bool:
    """Whether the second-level cache can be asked for a kilobyte at once: from compute capability 9.0 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


class DecodeStep:
    """`step()` reads `tokens`, writes `logits` and moves every state and `position` on, all in place.

    embedding and head [V, M] in the weights' dtype (bf16, fp16 or fp32); log_decay [L, H] fp32; position [B] int64.
    `scale` multiplies the embedding. The tensors must stay where they are. After it `tokens` is the likeliest of the first
    `num_choices` tokens, `top` [B] its logit.
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
        num_choices: int,
    ) -> None:
        """`silu`: whether q and k, v, and the first half of the channel mixer go through SiLU."""
        device = embedding.device
        (V, M), F = head.shape, layers[0].up.shape[0]
        B, H, _, D = layers[0].state.shape
        self.programs = num_programs(device)
        self.tokens = torch.zeros(B, dtype=torch.int64, device=device)
        self.logits = torch.zeros(B, V, dtype=torch.float32, device=device)
        self.top = torch.zeros(B, dtype=torch.float32, device=device)
        self._num_choices = num_choices
        self._tensors = [layers, embedding, head]  # the table below holds bare addresses
        vectors = [torch.zeros(B, width, dtype=torch.float32, device=device) for width in (M, 4 * M, M, F)]
        self._arguments = (
            self.tokens, position, embedding, head, log_decay.contiguous(),
            torch.tensor(addresses(layers), device=device), *vectors, self.logits,
            torch.zeros(1, dtype=torch.int32, device=device), len(layers), H, V, self.programs, scale, eps,
        )  # fmt: skip
        power = triton.next_power_of_2
        owned, wide = power(triton.cdiv(M, self.programs)), max(1, _TILE // power(M))
        self._sizes = {
            "B": B, "M": M, "F": F, "D": D, "BM": power(M), "BF": power(F), "BD": power(D), "BE": 8,
            "RX": owned, "RO": min(owned, wide), "RM": wide, "RU": max(1, wide // 2),
            "RF": min(owned, max(1, _TILE // power(F))),
            "SILU": silu[0], "SILU_VALUE": silu[1], "SILU_GLU": silu[2],
            # Pieces of a row must be multiples of 16 bytes.
            "ASK": can_ask(device) and all(width * embedding.element_size() % 64 == 0 for width in (M, F)),
        }  # fmt: skip

    def __call__(self) -> None:
        """One step. The programs wait for each other, so all must fit on the GPU at once: the launch says if not."""
        more = {"launch_cooperative_grid": True} if self.tokens.is_cuda else {}
        _decode_kernel[(self.programs,)](*self._arguments, **self._sizes, num_warps=_NUM_WARPS, num_stages=1, **more)
        # As the sampler chooses.
        torch.argmax(self.logits[:, : self._num_choices], dim=-1, out=self.tokens)
        torch.gather(self.logits, 1, self.tokens[:, None], out=self.top[:, None])
