"""One decoding step of a small model (rows of up to 2,048 in bf16) in one persistent Triton kernel, batch 1.

Like `decode.py` one program per multiprocessor stays for the whole step, and all need each other's results five times a
layer. At this size a phase lasts two or three microseconds, so what counts is everything between the phases:

- A row of a matrix belongs to one warp, from its load to its sum. No warp meets another but where a vector is spread.
- Nobody waits at a barrier, which costs a fence, an atomic and a look one after the other. An element of a vector is one
  64-bit word: its fp32 value, and the number of the phase that wrote it. Readers look until the number is right.
- Weights depend on nothing, so every unit of them (8 rows, or a chunk of them) is loaded into registers `N` units before
  its use, and into the second-level cache `X` units before that, whatever phase it belongs to. Not more: a
  multiprocessor seems to answer loads in order, so that looks queue behind the weights.

A word is not overwritten before all who need it have read it: the writer of the next value has read, through others,
something of everybody who owns rows of the phase that reads this one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnllm.kernels.decode_step.wide import (
    DOWN,
    GATE,
    NUM_COLUMNS,
    OUT,
    QKVU,
    STATE,
    THETA,
    UP,
    Layer,
    _address,
    _decay_less_one,
    _prefetch,
    _silu,
    addresses,
    can_ask,
    num_programs,
)

_NUM_WARPS = 8
_UNIT_BYTES = 16384
# Units of weights in registers and ahead of them in the second-level cache, by the chunks of a row. Measured on an H100:
# 385M (one chunk) 0.451 ms with 3 and 7; 0.463 with 3 and 5, 0.464 with 4 and 6, 0.466 with 2 and 8, 0.525 with 4 and 0.
# 1B (two) 0.875 with 4 and 0; 0.956 with 4 and 4: its phases are long enough to be bound by the bus.
_DEPTH = {1: (3, 7), 2: (4, 0)}


def chunks(width: int, itemsize: int) -> tuple[int, int]:
    """Blocks of 256 in a unit's row, and units to a row of `width` elements."""
    blocks = triton.cdiv(width, 256)
    C = max(1, min(triton.next_power_of_2(blocks), _UNIT_BYTES // (256 * _NUM_WARPS * itemsize)))
    return C, triton.cdiv(blocks, C)


def fits(model_dim: int, itemsize: int) -> bool:
    """Whether a vector of the model's width fits into registers beside the weights, and the assembly is the GPU's."""
    return chunks(model_dim, itemsize)[1] in _DEPTH and torch.version.hip is None


def _look(n: int) -> tuple[str, str, int]:
    """Assembly that gives the values of n words once their numbers are reached, its operands, and n.

    For each word: its address, what a first look saw, the number wanted. A larger number is as good: whoever sees one has
    no part in this phase.
    """
    registers = "".join(f".reg .b32 value{i}, number{i}; .reg .b64 word{i}; " for i in range(n))
    first = "".join(f"mov.b64 {{value{i}, number{i}}}, ${2 * n + i}; " for i in range(n))
    again = "".join(f"ld.relaxed.gpu.global.b64 word{i}, [${n + i}]; " for i in range(n))
    again += "".join(f"mov.b64 {{value{i}, number{i}}}, word{i}; " for i in range(n))
    test = "mov.b32 least, 0x7fffffff; "
    test += "".join(f"sub.s32 ahead, number{i}, ${3 * n}; min.s32 least, least, ahead; " for i in range(n))
    test += "setp.ge.s32 right, least, 0; "
    values = "".join(f"mov.b32 ${i}, value{i}; " for i in range(n))
    declared = f".reg .pred right; .reg .b32 least, ahead; {registers}"
    code = f"{{ {declared}{first}{test}@right bra SEEN; AGAIN: {again}{test}@!right bra AGAIN; SEEN: {values}}}"
    return code, ",".join(["=r"] * n + ["l"] * (2 * n) + ["r"] * n), n


@triton.jit
def _glance(p):
    """The words at p as they are now. A load of its own: the compiler will not repeat it."""
    return tl.load(p, volatile=True)


@triton.jit
def _await(words, p, number, ALONE: tl.constexpr, LOOK: tl.constexpr):
    """Values of the words at p, of which `_glance` saw `words`, of the phase `number`. Does not wait where ALONE."""
    if ALONE:
        right = (words >> 32).to(tl.int32) - number >= 0
        return tl.where(right, words.to(tl.int32).to(tl.float32, bitcast=True), float("nan"))
    else:
        bits = tl.inline_asm_elementwise(LOOK[0], LOOK[1], [p, words, number], tl.int32, False, LOOK[2])
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _publish(p, value, number, mask):
    low = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(p, low | (number.to(tl.int64) << 32), mask=mask)


@triton.jit
def _spread(y, C: tl.constexpr, R: tl.constexpr):
    """[C * 256] -> [R, C, 256], the same for every row."""
    # A gather of every element from its own place: anything else would force the layout of y on the weights.
    line = tl.broadcast_to(tl.arange(0, C)[:, None], [C, 256])
    y = tl.gather(tl.reshape(y, [C, 256]), line, 0)
    return tl.broadcast_to(y[None, :, :], [R, C, 256])


@triton.jit
def _read(words, number, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, ALONE: tl.constexpr, LOOK: tl.constexpr):
    """A vector of K of the phase `number`, in chunks [R, C, 256], and the sum of its squares [R]."""
    NC: tl.constexpr = (K + C * 256 - 1) // (C * 256)
    k = tl.arange(0, C * 256)
    seen, ys = (), ()
    for c in tl.static_range(NC):
        seen = seen + (_glance(words + tl.minimum(c * C * 256 + k, K - 1)),)
    squares = tl.zeros([R, 256], tl.float32)
    for c in tl.static_range(NC):
        y = _await(seen[c], words + tl.minimum(c * C * 256 + k, K - 1), number, ALONE, LOOK)
        y = _spread(tl.where(c * C * 256 + k < K, y, 0.0), C, R)
        squares += tl.sum(y * y, 1)
        ys = ys + (y,)
    return ys, tl.sum(squares, 1)


@triton.jit
def _rows(tile, P, R: tl.constexpr):
    """The rows of tile number `tile` of this program."""
    return tl.program_id(0) + P * (tile * R + tl.arange(0, R))


@triton.jit
def _place(unit, P, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """Rows and first column of a unit; tile by tile, or where T chunk by chunk of T tiles."""
    NC: tl.constexpr = (K + C * 256 - 1) // (C * 256)
    tile, chunk = unit // NC, unit % NC
    if T:
        tile, chunk = unit % T, unit // T
    return _rows(tile, P, R), chunk * C * 256


@triton.jit
def _load(w, num_rows, unit, P, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """[R, C, 256]: a unit of a [num_rows, K] matrix, a row to a warp."""
    r, first = _place(unit, P, C, R, K, T)
    k = first + (tl.arange(0, C) * 256)[None, :, None] + tl.arange(0, 256)[None, None, :]
    mask = (r < num_rows)[:, None, None]
    if K % (C * 256) != 0:
        mask = mask & (k < K)
    p_w = (w + r.to(tl.int64) * K)[:, None, None] + k
    return tl.load(p_w, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _ask(w, num_rows, unit, P, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """Has the second-level cache read a unit."""
    r, first = _place(unit, P, C, R, K, T)
    lane = tl.arange(0, 32)[None, :]
    p_w = (w + r.to(tl.int64) * K + first)[:, None] + 8 * lane
    size = tl.minimum(C * 256, K - first) * (w.dtype.element_ty.primitive_bitwidth // 8)
    _prefetch(p_w, size, (r < num_rows)[:, None] & (lane == 0))


@triton.jit
def _unit(
    S: tl.constexpr, LOAD: tl.constexpr, table, layer, num_layers, V, P, DTYPE: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, U: tl.constexpr, W: tl.constexpr, C: tl.constexpr, R: tl.constexpr, M: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Unit number S of a layer: A of qkvu, B of out, U of up and gate in turn, W of down, then the next layer's.

    After the last layer come the rows of the head. Loads it, or asks for it.
    """
    which: tl.constexpr = _load if LOAD else _ask
    result = 0
    if S < A:
        result = which(_address(table, layer, QKVU, DTYPE), 4 * M, S, P, C, R, M, 0)
    elif S < A + B:
        result = which(_address(table, layer, OUT, DTYPE), M, S - A, P, C, R, M, 0)
    elif S < A + B + U:
        half: tl.constexpr = (S - A - B) // 2
        if (S - A - B) % 2 == 0:
            result = which(_address(table, layer, UP, DTYPE), F, half, P, C, R, M, 0)
        else:
            result = which(_address(table, layer, GATE, DTYPE), F, half, P, C, R, M, 0)
    elif S < A + B + U + W:
        T: tl.constexpr = W // ((F + C * 256 - 1) // (C * 256))
        result = which(_address(table, layer, DOWN, DTYPE), M, S - A - B - U, P, C, R, F, T)
    elif S < A + B + U + W + A:
        num_rows = tl.where(layer + 1 < num_layers, 4 * M, V)
        result = which(_address(table, layer + 1, QKVU, DTYPE), num_rows, S - A - B - U - W, P, C, R, M, 0)
    else:
        tl.static_assert(not LOAD)
        if layer + 1 < num_layers:
            _unit(S - A - B - U - W, LOAD, table, layer + 1, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F)
    return result


@triton.jit
def _advance(
    ring, S: tl.constexpr, X: tl.constexpr, table, layer, num_layers, V, P, DTYPE: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, U: tl.constexpr, W: tl.constexpr, C: tl.constexpr, R: tl.constexpr, M: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The ring after unit number S of the layer was used: without it, with the one that comes next."""
    N: tl.constexpr = len(ring)
    if X > 0:
        _unit(S + N + X, False, table, layer, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F)
    return ring[1:] + (_unit(S + N, True, table, layer, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F),)


@triton.jit
def _partial(b_w, y, acc, CHUNK: tl.constexpr):
    """[R, 256]: products of a unit with its chunk of the vector, added to those of earlier chunks."""
    part = tl.sum(b_w.to(tl.float32) * y, 1)
    if CHUNK > 0:
        part += acc
    return part


@triton.jit
def _put(out, number, own_x, r, result, num_rows, PLAIN: tl.constexpr, R: tl.constexpr):
    """out[r] = result [R], added to own_x where given. By one thread of the row's warp, so that no warps meet."""
    lane = tl.arange(0, 32)[None, :]
    at = r[:, None] + lane
    mask = (r < num_rows)[:, None] & (lane == 0)
    result = tl.broadcast_to(result[:, None], [R, 32])
    if own_x is not None:
        result += tl.load(own_x + at, mask=mask, other=0.0)
        tl.store(own_x + at, result, mask=mask)
    if PLAIN:
        tl.store(out + at, result, mask=mask)
    else:
        _publish(out + at, result, number, mask)


@triton.jit
def _put_gated(h, number, r, acc, acc_gate, inverse, F, SILU: tl.constexpr, R: tl.constexpr):
    """h[r] = act(acc) * acc_gate, both summed and of the normalized vector."""
    up = tl.sum(acc, 1) * inverse
    if SILU:
        up = _silu(up)
    _put(h, number, None, r, up * tl.sum(acc_gate, 1) * inverse, F, False, R)


@triton.jit
def _update_state(
    p_state, theta, log_decay, position, qkvu, o, number, item, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, SILU: tl.constexpr, SILU_VALUE: tl.constexpr, ALONE: tl.constexpr, LOOK_1: tl.constexpr,
):  # fmt: skip
    """Columns number `item` of a layer's states [H, D or 2D, D]: S = decay S + k v^T, o = q^T S."""
    d = tl.arange(0, BD)
    m_d = (d < D)[:, None]
    key_width = D
    if theta != 0:
        key_width = 2 * D
    head_of, e = item // (D // BE), item % (D // BE) * BE + tl.arange(0, BE)
    p_s = p_state + head_of * key_width * D + d[:, None] * D + e[None, :]
    b_s = tl.load(p_s, mask=m_d, other=0.0)
    loss = _decay_less_one(tl.load(log_decay + head_of))
    p_q, p_v = qkvu + head_of * D + tl.minimum(d, D - 1), qkvu + 2 * M + head_of * D + e
    q, k, v = _glance(p_q), _glance(p_q + M), _glance(p_v)
    q = _await(q, p_q, number, ALONE, LOOK_1)
    k = _await(k, p_q + M, number, ALONE, LOOK_1)
    v = _await(v, p_v, number, ALONE, LOOK_1)
    if SILU:
        q, k = _silu(q), _silu(k)
    if SILU_VALUE:
        v = _silu(v)
    b_o = tl.zeros([BE], tl.float32)
    if theta != 0:
        # LRPE doubles q and k; the angle is reduced to one turn in float64, as positions reach 10^6.
        p_theta = theta.to(tl.pointer_type(tl.float32)) + head_of * D + d
        turns = tl.load(p_theta, mask=d < D, other=0.0).to(tl.float64) * 0.15915494309189535
        turns *= tl.load(position).to(tl.float64)
        angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
        b_t = tl.load(p_s + D * D, mask=m_d, other=0.0)
        b_t += loss * b_t + (k * tl.sin(angle))[:, None] * v[None, :]
        tl.store(p_s + D * D, b_t, mask=m_d)
        b_o = tl.sum((q * tl.sin(angle))[:, None] * b_t, 0)
        q, k = q * tl.cos(angle), k * tl.cos(angle)
    b_s += loss * b_s + k[:, None] * v[None, :]
    _publish(o + head_of * D + e, b_o + tl.sum(tl.where(m_d, q[:, None] * b_s, 0.0), 0), number + 1, e < D)
    tl.store(p_s, b_s, mask=m_d)


@triton.jit
def _choose(high, row, best, tokens, top, P):
    """tokens, top = the row of the highest of all programs' `high`, and that; the first of equal ones, NaN before all.

    `best` holds the highest so far in one word that orders as it does, and how many programs have come. The last of them
    writes the result.
    """
    bits = high.to(tl.int32, bitcast=True)
    bits = tl.where(high != high, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    tl.atomic_max(best, tl.max((bits.to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64), 0))
    if tl.atomic_add(best + 1, 1) == P - 1:
        word = tl.atomic_xchg(best, -0x7FFFFFFFFFFFFFFF)
        tl.store(best + 1, 0)
        order = (word >> 32).to(tl.int32)
        tl.store(tokens, 0x7FFFFFFF - (word & 0x7FFFFFFF))
        tl.store(top, tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True))


@triton.jit
def _decode_rows_kernel(
    tokens, position, embedding, head, log_decay, table, x, qkvu, o, h, own_x, logits, steps, best, top, num_choices,
    num_layers, H, V, scale, eps,
    P: tl.constexpr, M: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    N: tl.constexpr, X: tl.constexpr, A: tl.constexpr, B: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, ALONE: tl.constexpr, LOOK: tl.constexpr, LOOK_1: tl.constexpr,
    SILU: tl.constexpr, SILU_VALUE: tl.constexpr, SILU_GLU: tl.constexpr,
):  # fmt: skip
    """Grid (P,), all resident at once; `RowDecodeStep` says what the arguments are."""
    DTYPE: tl.constexpr = embedding.dtype.element_ty
    NC: tl.constexpr = (M + C * 256 - 1) // (C * 256)
    NF: tl.constexpr = (F + C * 256 - 1) // (C * 256)
    pid = tl.program_id(0)
    # Phases of this step are numbered from here; the embedding is one less.
    step = tl.load(steps + pid)
    number = step * (5 * num_layers + 1) + 2
    ring = ()
    for s in tl.static_range(N):
        ring = ring + (_unit(s, True, table, 0, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F),)
    for s in tl.static_range(X):
        _unit(N + s, False, table, 0, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F)
    lane = tl.arange(0, 32)[None, :]
    for tile in tl.static_range((M + P * R - 1) // (P * R)):
        r = _rows(tile, P, R)
        mask = (r < M)[:, None] & (lane == 0)
        b_x = tl.load(embedding + tl.load(tokens) * M + r[:, None] + lane, mask=mask, other=0.0).to(tl.float32) * scale
        tl.store(own_x + r[:, None] + lane, b_x, mask=mask)
        _publish(x + r[:, None] + lane, b_x, number - 1, mask)

    for layer in range(num_layers):
        acc = tl.zeros([R, 256], tl.float32)
        acc_gate = tl.zeros([R, 256], tl.float32)
        # q, k, v, u. Where units are many, all but the last of them in a loop: code has to fit into its cache.
        ys, squares = _read(x, number - 1, C, R, M, ALONE, LOOK)
        inverse = tl.rsqrt(squares / M + eps)
        LOOP_A: tl.constexpr = (A // N - 1) * N if A >= 4 * N else 0
        w = _address(table, layer, QKVU, DTYPE)
        for base in range(0, LOOP_A, N):
            for j in tl.static_range(N):
                acc = _partial(ring[0], ys[j % NC], acc, j % NC)
                if j % NC == NC - 1:
                    r = _rows((base + j) // NC, P, R)
                    _put(qkvu, number, None, r, tl.sum(acc, 1) * inverse, 4 * M, False, R)
                if X > 0:
                    _ask(w, 4 * M, base + j + N + X, P, C, R, M, 0)
                ring = ring[1:] + (_load(w, 4 * M, base + j + N, P, C, R, M, 0),)
        for j in tl.static_range(LOOP_A, A):
            acc = _partial(ring[0], ys[j % NC], acc, j % NC)
            if j % NC == NC - 1:
                _put(qkvu, number, None, _rows(j // NC, P, R), tl.sum(acc, 1) * inverse, 4 * M, False, R)
            ring = _advance(ring, j, X, table, layer, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F)

        p_state = _address(table, layer, STATE, tl.float32)
        theta = tl.load(table + layer * NUM_COLUMNS + THETA)
        for item in range(pid, H * (D // BE), P):
            _update_state(
                p_state, theta, log_decay + layer * H, position, qkvu, o, number, item,
                M, D, BD, BE, SILU, SILU_VALUE, ALONE, LOOK_1,
            )  # fmt: skip

        # x += W (norm(o) * u)
        us, _ = _read(qkvu + 3 * M, number, C, R, M, ALONE, LOOK)
        ys, squares = _read(o, number + 1, C, R, M, ALONE, LOOK)
        inverse = tl.rsqrt(squares / M + eps)
        for j in tl.static_range(B):
            acc = _partial(ring[0], ys[j % NC] * us[j % NC], acc, j % NC)
            if j % NC == NC - 1:
                _put(x, number + 2, own_x, _rows(j // NC, P, R), tl.sum(acc, 1) * inverse, M, False, R)
            ring = _advance(ring, A + j, X, table, layer, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F)

        # h = act(W_1 y) * (W_2 y)
        ys, squares = _read(x, number + 2, C, R, M, ALONE, LOOK)
        inverse = tl.rsqrt(squares / M + eps)
        LOOP_U: tl.constexpr = (U // N - 1) * N if U >= 4 * N and N % 2 == 0 else 0
        w, w_gate = _address(table, layer, UP, DTYPE), _address(table, layer, GATE, DTYPE)
        for base in range(0, LOOP_U, N):
            for j in tl.static_range(N):
                if j % 2 == 0:
                    acc = _partial(ring[0], ys[j // 2 % NC], acc, j // 2 % NC)
                else:
                    acc_gate = _partial(ring[0], ys[j // 2 % NC], acc_gate, j // 2 % NC)
                    if j // 2 % NC == NC - 1:
                        r = _rows((base + j) // 2 // NC, P, R)
                        _put_gated(h, number + 3, r, acc, acc_gate, inverse, F, SILU_GLU, R)
                if X > 0:
                    _ask(w if (j + X) % 2 == 0 else w_gate, F, (base + j + N + X) // 2, P, C, R, M, 0)
                ring = ring[1:] + (_load(w if j % 2 == 0 else w_gate, F, (base + j + N) // 2, P, C, R, M, 0),)
        for j in tl.static_range(LOOP_U, U):
            if j % 2 == 0:
                acc = _partial(ring[0], ys[j // 2 % NC], acc, j // 2 % NC)
            else:
                acc_gate = _partial(ring[0], ys[j // 2 % NC], acc_gate, j // 2 % NC)
                if j // 2 % NC == NC - 1:
                    _put_gated(h, number + 3, _rows(j // 2 // NC, P, R), acc, acc_gate, inverse, F, SILU_GLU, R)
            ring = _advance(ring, A + B + j, X, table, layer, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F)

        # x += W_3 h, chunk by chunk of h, as it is too long for registers.
        T: tl.constexpr = W // NF
        EARLY: tl.constexpr = 3 if NF > 3 else NF
        k = tl.arange(0, C * 256)
        seen, sums = (), ()
        for c in tl.static_range(EARLY):
            seen = seen + (_glance(h + tl.minimum(c * C * 256 + k, F - 1)),)
        for _ in tl.static_range(T):
            sums = sums + (tl.zeros([R, 256], tl.float32),)
        for c in tl.static_range(NF):
            y = _await(seen[0], h + tl.minimum(c * C * 256 + k, F - 1), number + 3, ALONE, LOOK)
            seen = seen[1:]
            if c + EARLY < NF:
                seen = seen + (_glance(h + tl.minimum((c + EARLY) * C * 256 + k, F - 1)),)
            y = _spread(tl.where(c * C * 256 + k < F, y, 0.0), C, R)
            for t in tl.static_range(T):
                sums = sums[1:] + (_partial(ring[0], y, sums[0], 1),)
                ring = _advance(
                    ring, A + B + U + c * T + t, X, table, layer, num_layers, V, P, DTYPE, A, B, U, W, C, R, M, F
                )
        for t in tl.static_range(T):
            _put(x, number + 4, own_x, _rows(t, P, R), tl.sum(sums[t], 1), M, False, R)
        number += 5

    ys, squares = _read(x, number - 1, C, R, M, ALONE, LOOK)
    inverse = tl.rsqrt(squares / M + eps)
    acc = tl.zeros([R, 256], tl.float32)
    high, high_row = tl.full([R], float("-inf"), tl.float32), tl.zeros([R], tl.int32)
    for base in range(0, tl.cdiv(V, P * R) * NC, N):
        for j in tl.static_range(N):
            acc = _partial(ring[0], ys[j % NC], acc, j % NC)
            if j % NC == NC - 1:
                r = _rows((base + j) // NC, P, R)
                result = tl.sum(acc, 1) * inverse
                _put(logits, number, None, r, result, V, True, R)
                higher = (r < num_choices) & ((result > high) | (result != result))
                high, high_row = tl.where(higher, result, high), tl.where(higher, r, high_row)
            if X > 0:
                _ask(head, V, base + j + N + X, P, C, R, M, 0)
            ring = ring[1:] + (_load(head, V, base + j + N, P, C, R, M, 0),)
    _choose(high, high_row, best, tokens, top, P)
    tl.debug_barrier()
    tl.store(steps + pid, step + 1)
    if pid == 0:
        tl.store(position, tl.load(position) + 1)


def _words(widths: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Vectors of zero words, side by side, the first of them 3.5 KB behind a multiple of 2 MB.

    All multiprocessors look at the same few kilobytes, so it matters how these fall on the parts of the second-level cache.
    On an H100 a step of 385M took 0.448 to 0.452 ms at this place and 0.47 at the multiple itself; where the allocator puts
    them, something between, on three of these GPUs. At 1B it makes no difference.
    """
    if device.type == "cpu":
        return [torch.zeros(width, dtype=torch.int64) for width in widths]
    page = 1 << 21
    room = torch.zeros((page + 3584) // 8 + sum(widths), dtype=torch.int64, device=device)
    first = (-room.data_ptr() % page + 3584) // 8
    return list(room[first : first + sum(widths)].split(widths))


class RowDecodeStep:
    """`step()` reads `tokens`, writes `logits` and moves every state and `position` on, all in place.

    As `decode.DecodeStep`, for a batch of 1 and a model for which `fits` holds. After it `tokens` is the likeliest of the
    first `num_choices` tokens, `top` [1] its logit.
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
        _, H, _, D = layers[0].state.shape
        self.programs = num_programs(device)
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(1, V, dtype=torch.float32, device=device)
        self.top = torch.zeros(1, device=device)
        best = torch.tensor([-(2**63) + 1, 0], device=device)
        self._tensors = [layers, embedding, head]  # the table below holds bare addresses
        rows = addresses(layers)
        rows.append([head.data_ptr()] + [0] * (len(rows[0]) - 1))
        words = _words((M, 4 * M, M, F), device)
        self._arguments = (
            self.tokens, position, embedding, head, log_decay.contiguous(), torch.tensor(rows, device=device), *words,
            torch.zeros(M, device=device), self.logits, torch.zeros(self.programs, dtype=torch.int32, device=device),
            best, self.top, num_choices, len(layers), H, V, scale, eps,
        )  # fmt: skip
        power, cdiv, P, R = triton.next_power_of_2, triton.cdiv, self.programs, _NUM_WARPS
        C, NC = chunks(M, embedding.element_size())
        N, X = _DEPTH[NC]
        # Asking needs rows at multiples of 16 bytes.
        asks = can_ask(device) and all(width * embedding.element_size() % 16 == 0 for width in (M, F))
        tiles = cdiv(M, P * R)
        self._sizes = {
            "P": P, "M": M, "F": F, "D": D, "BD": power(D), "BE": min(power(cdiv(H * D, P)), D & -D),
            "N": N, "X": X if asks and P > 1 else 0, "A": max(N, cdiv(4 * M, P * R) * NC), "B": tiles * NC,
            "U": 2 * cdiv(F, P * R) * NC, "W": tiles * cdiv(F, 256 * C), "C": C, "R": R,
            "ALONE": P == 1, "LOOK": _look(C), "LOOK_1": _look(1),
            "SILU": silu[0], "SILU_VALUE": silu[1], "SILU_GLU": silu[2],
        }  # fmt: skip

    def __call__(self) -> None:
        """One step. The programs wait for each other, so all must fit on the GPU at once: the launch says if not."""
        more = {"launch_cooperative_grid": True} if self.tokens.is_cuda else {}
        grid = (self.programs,)
        _decode_rows_kernel[grid](*self._arguments, **self._sizes, num_warps=_NUM_WARPS, num_stages=1, **more)
