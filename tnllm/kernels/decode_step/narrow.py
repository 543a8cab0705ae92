"""One decode step of a small model (rows of up to 2,048 in bf16) in one persistent Triton kernel, batch 1.

As in `wide.py`, one program per SM stays resident for the whole step, and all of them need each other's results five times
a layer. At this size a phase lasts two or three microseconds, so the time between phases decides:

- A row of a matrix belongs to one warp, from its load to its sum. Warps synchronise only when a vector is broadcast.
- There is no grid barrier: it would cost a fence, an atomic and a poll in sequence. An element of a vector is one 64-bit
  word: its fp32 value, tagged with the producing phase's sequence number. Consumers spin until the tag matches.
- Weights depend on nothing. They are cut into units: R rows (one per warp), or a chunk of R rows where a full row is too
  long. The units of all phases form one sequence. Each is loaded into registers RING units before its use, and prefetched
  into L2 AHEAD units before that, whatever phase it belongs to. Not further ahead: an SM appears to return loads in order,
  so polls queue behind weight loads.

No word is overwritten before all its consumers have read it: the program that writes the next value has read, directly or
through other programs' results, something from every program that owns rows of the phase that consumes this one.

Constants of the kernel, beside the package's:

    RING, AHEAD   units in registers, and further units in L2
    C             blocks of 256 elements in a unit's row: a chunk is C * 256 elements
    NC, NF        chunks in a row of M and of F elements
    START         index of the first unit of each phase of a layer (qkvu, out, up and gate in turn, down), and their number
    S             index of a unit in its layer; beyond the layer's last it continues in the next layer, then in the head
    T             tiles (of R rows per program) whose chunks are interleaved: 0 where a tile's chunks follow one another
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

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

_NUM_WARPS = 8
_UNIT_BYTES = 16384
# RING and AHEAD by the number of chunks in a row. Measured on an H100:
# 385M (one chunk) 0.451 ms with 3 and 7; 0.463 with 3 and 5, 0.464 with 4 and 6, 0.466 with 2 and 8, 0.525 with 4 and 0.
# 1B (two) 0.875 with 4 and 0; 0.956 with 4 and 4: its phases are long enough to be bound by memory bandwidth.
_DEPTH = {1: (3, 7), 2: (4, 0)}


def chunks(width: int, itemsize: int) -> tuple[int, int]:
    """C and NC for rows of `width` elements: blocks of 256 in a unit's row, and chunks in a full row."""
    blocks = triton.cdiv(width, 256)
    C = max(1, min(triton.next_power_of_2(blocks), _UNIT_BYTES // (256 * _NUM_WARPS * itemsize)))
    return C, triton.cdiv(blocks, C)


def fits(model_dim: int, itemsize: int) -> bool:
    """Whether a vector of the model's width fits into registers beside the weights. The inline PTX needs an NVIDIA GPU."""
    return chunks(model_dim, itemsize)[1] in _DEPTH and torch.version.hip is None


def _spin_wait_ptx(n: int) -> tuple[str, str, int]:
    """PTX that waits for n tagged words and returns their n values; its operand constraints; and n.

    Operands: the n addresses, the n words that a first load returned, the wanted sequence number. A larger tag is accepted
    too: a program that sees one has no rows in this phase. For n = 1 the PTX is

        { .reg .pred ready; .reg .b32 least, ahead; .reg .b32 value0, seq0; .reg .b64 word0;
          mov.b64 {value0, seq0}, $2;                        // the word loaded before
          mov.b32 least, 0x7fffffff;                         // least of seq_i - wanted
          sub.s32 ahead, seq0, $3; min.s32 least, least, ahead;
          setp.ge.s32 ready, least, 0;
          @ready bra DONE;
        POLL:
          ld.relaxed.gpu.global.b64 word0, [$1];
          mov.b64 {value0, seq0}, word0;
          ...                                                // the same test
          @!ready bra POLL;
        DONE:
          mov.b32 $0, value0; }
    """
    registers = "".join(f".reg .b32 value{i}, seq{i}; .reg .b64 word{i}; " for i in range(n))
    first = "".join(f"mov.b64 {{value{i}, seq{i}}}, ${2 * n + i}; " for i in range(n))
    poll = "".join(f"ld.relaxed.gpu.global.b64 word{i}, [${n + i}]; " for i in range(n))
    poll += "".join(f"mov.b64 {{value{i}, seq{i}}}, word{i}; " for i in range(n))
    test = "mov.b32 least, 0x7fffffff; "
    test += "".join(f"sub.s32 ahead, seq{i}, ${3 * n}; min.s32 least, least, ahead; " for i in range(n))
    test += "setp.ge.s32 ready, least, 0; "
    values = "".join(f"mov.b32 ${i}, value{i}; " for i in range(n))
    declared = f".reg .pred ready; .reg .b32 least, ahead; {registers}"
    code = f"{{ {declared}{first}{test}@ready bra DONE; POLL: {poll}{test}@!ready bra POLL; DONE: {values}}}"
    return code, ",".join(["=r"] * n + ["l"] * (2 * n) + ["r"] * n), n


@triton.jit
def _load_volatile(p):
    """The words at p as they are now. Volatile, so that the compiler does not repeat or move the load."""
    return tl.load(p, volatile=True)


@triton.jit
def _wait_tagged(words, p, seq, SINGLE_PROGRAM: tl.constexpr, SPIN_WAIT: tl.constexpr):
    """Spin until the words at p, last seen as `words`, are tagged `seq` or later; returns their fp32 values.

    With SINGLE_PROGRAM (the interpreter, which runs no PTX) all words are ready; a wrong tag gives NaN.
    """
    if SINGLE_PROGRAM:
        ready = (words >> 32).to(tl.int32) - seq >= 0
        return tl.where(ready, words.to(tl.int32).to(tl.float32, bitcast=True), float("nan"))
    else:
        bits = tl.inline_asm_elementwise(SPIN_WAIT[0], SPIN_WAIT[1], [p, words, seq], tl.int32, False, SPIN_WAIT[2])
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _store_tagged(p, value, seq, mask):
    """Publish fp32 values: one 64-bit store each, so that value and tag arrive together."""
    low = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(p, low | (seq.to(tl.int64) << 32), mask=mask)


@triton.jit
def _broadcast(y, C: tl.constexpr, R: tl.constexpr):
    """[C * 256] -> [R, C, 256], the same for every row."""
    # Gathering every element from its own index changes nothing, but keeps the layout of y from reaching the weights.
    index = tl.broadcast_to(tl.arange(0, C)[:, None], [C, 256])
    y = tl.gather(tl.reshape(y, [C, 256]), index, 0)
    return tl.broadcast_to(y[None, :, :], [R, C, 256])


@triton.jit
def _read_vector(
    words, seq, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, SINGLE_PROGRAM: tl.constexpr, SPIN_WAIT: tl.constexpr
):
    """Wait for a vector of K elements tagged `seq`: its chunks, each [R, C, 256], and the sum of its squares [R]."""
    NC: tl.constexpr = (K + C * 256 - 1) // (C * 256)
    k = tl.arange(0, C * 256)
    # All first loads are in flight before the first wait.
    loaded, ys = (), ()
    for c in tl.static_range(NC):
        loaded = loaded + (_load_volatile(words + tl.minimum(c * C * 256 + k, K - 1)),)
    squares = tl.zeros([R, 256], tl.float32)
    for c in tl.static_range(NC):
        y = _wait_tagged(loaded[c], words + tl.minimum(c * C * 256 + k, K - 1), seq, SINGLE_PROGRAM, SPIN_WAIT)
        y = _broadcast(tl.where(c * C * 256 + k < K, y, 0.0), C, R)
        squares += tl.sum(y * y, 1)
        ys = ys + (y,)
    return ys, tl.sum(squares, 1)


@triton.jit
def _unit_offset(unit, P, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """Rows [R] and first column of a matrix's unit; see T above."""
    NC: tl.constexpr = (K + C * 256 - 1) // (C * 256)
    tile, chunk = unit // NC, unit % NC
    if T:
        tile, chunk = unit % T, unit // T
    return program_rows(tile, P, R), chunk * C * 256


@triton.jit
def _load_unit(w, num_rows, unit, P, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """[R, C, 256]: a unit of a [num_rows, K] matrix, one row per warp."""
    r, first = _unit_offset(unit, P, C, R, K, T)
    k = first + (tl.arange(0, C) * 256)[None, :, None] + tl.arange(0, 256)[None, None, :]
    mask = (r < num_rows)[:, None, None]
    if K % (C * 256) != 0:
        mask = mask & (k < K)
    p_w = (w + r.to(tl.int64) * K)[:, None, None] + k
    return tl.load(p_w, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _prefetch_unit(w, num_rows, unit, P, C: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """Prefetch a unit into L2."""
    r, first = _unit_offset(unit, P, C, R, K, T)
    lane = tl.arange(0, 32)[None, :]
    p_w = (w + r.to(tl.int64) * K + first)[:, None] + 8 * lane
    size = tl.minimum(C * 256, K - first) * (w.dtype.element_ty.primitive_bitwidth // 8)
    prefetch_l2(p_w, size, (r < num_rows)[:, None] & (lane == 0))


@triton.jit
def _fetch(
    S: tl.constexpr, LOAD: tl.constexpr, table, layer, num_layers, V, P, DTYPE: tl.constexpr, START: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, M: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Load unit S of a layer if LOAD, else prefetch it. After the last layer come the rows of the head."""
    fetch: tl.constexpr = _load_unit if LOAD else _prefetch_unit
    result = 0
    if START[1] > S:
        result = fetch(load_pointer(table, layer, QKVU, DTYPE), 4 * M, S, P, C, R, M, 0)
    elif START[2] > S:
        result = fetch(load_pointer(table, layer, OUT, DTYPE), M, S - START[1], P, C, R, M, 0)
    elif START[3] > S:
        half: tl.constexpr = (S - START[2]) // 2
        if (S - START[2]) % 2 == 0:
            result = fetch(load_pointer(table, layer, UP, DTYPE), F, half, P, C, R, M, 0)
        else:
            result = fetch(load_pointer(table, layer, GATE, DTYPE), F, half, P, C, R, M, 0)
    elif START[4] > S:
        T: tl.constexpr = (START[4] - START[3]) // ((F + C * 256 - 1) // (C * 256))
        result = fetch(load_pointer(table, layer, DOWN, DTYPE), M, S - START[3], P, C, R, F, T)
    elif START[4] + START[1] > S:
        num_rows = tl.where(layer + 1 < num_layers, 4 * M, V)
        result = fetch(load_pointer(table, layer + 1, QKVU, DTYPE), num_rows, S - START[4], P, C, R, M, 0)
    else:
        tl.static_assert(not LOAD)
        if layer + 1 < num_layers:
            _fetch(S - START[4], LOAD, table, layer + 1, num_layers, V, P, DTYPE, START, C, R, M, F)
    return result


@triton.jit
def _advance(
    ring, S: tl.constexpr, AHEAD: tl.constexpr, table, layer, num_layers, V, P, DTYPE: tl.constexpr, START: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, M: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The ring after unit S of the layer was used: that unit is dropped, the one RING units later is loaded."""
    RING: tl.constexpr = len(ring)
    if AHEAD > 0:
        _fetch(S + RING + AHEAD, False, table, layer, num_layers, V, P, DTYPE, START, C, R, M, F)
    return ring[1:] + (_fetch(S + RING, True, table, layer, num_layers, V, P, DTYPE, START, C, R, M, F),)


@triton.jit
def _accumulate(b_w, y, acc, CHUNK: tl.constexpr):
    """[R, 256]: products of a unit with its chunk of the vector, added to those of the row's earlier chunks."""
    partial = tl.sum(b_w.to(tl.float32) * y, 1)
    if CHUNK > 0:
        partial += acc
    return partial


@triton.jit
def _store_row(out, seq, residual, r, result, num_rows, TAGGED: tl.constexpr, R: tl.constexpr):
    """out[r] = result [R], added to residual[r] where given. By one lane of the row's warp: warps do not synchronise."""
    lane = tl.arange(0, 32)[None, :]
    index = r[:, None] + lane
    mask = (r < num_rows)[:, None] & (lane == 0)
    result = tl.broadcast_to(result[:, None], [R, 32])
    if residual is not None:
        result += tl.load(residual + index, mask=mask, other=0.0)
        tl.store(residual + index, result, mask=mask)
    if TAGGED:
        _store_tagged(out + index, result, seq, mask)
    else:
        tl.store(out + index, result, mask=mask)


@triton.jit
def _store_gated_row(h, seq, r, acc, acc_gate, inverse_rms, F, SILU: tl.constexpr, R: tl.constexpr):
    """h[r] = act(sum(acc)) * sum(acc_gate), both scaled by the norm of the vector they multiplied."""
    up = tl.sum(acc, 1) * inverse_rms
    if SILU:
        up = silu(up)
    _store_row(h, seq, None, r, up * tl.sum(acc_gate, 1) * inverse_rms, F, True, R)


@triton.jit
def _update_state_tile(
    p_state, theta, log_decay, position, qkvu, o, seq, item, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, SILU: tl.constexpr, SILU_VALUE: tl.constexpr, SINGLE_PROGRAM: tl.constexpr, SPIN_WAIT_1: tl.constexpr,
):  # fmt: skip
    """(head, BE columns) number `item` of a layer's states [H, D or 2D, D]: S = decay S + k v^T, o = q^T S."""
    d = tl.arange(0, BD)
    m_d = (d < D)[:, None]
    key_width = D
    if theta != 0:
        key_width = 2 * D
    head_of, e = item // (D // BE), item % (D // BE) * BE + tl.arange(0, BE)
    p_s = p_state + head_of * key_width * D + d[:, None] * D + e[None, :]
    b_s = tl.load(p_s, mask=m_d, other=0.0)
    decay_minus_one = exp_minus_one(tl.load(log_decay + head_of))
    p_q, p_v = qkvu + head_of * D + tl.minimum(d, D - 1), qkvu + 2 * M + head_of * D + e
    q, k, v = _load_volatile(p_q), _load_volatile(p_q + M), _load_volatile(p_v)
    q = _wait_tagged(q, p_q, seq, SINGLE_PROGRAM, SPIN_WAIT_1)
    k = _wait_tagged(k, p_q + M, seq, SINGLE_PROGRAM, SPIN_WAIT_1)
    v = _wait_tagged(v, p_v, seq, SINGLE_PROGRAM, SPIN_WAIT_1)
    if SILU:
        q, k = silu(q), silu(k)
    if SILU_VALUE:
        v = silu(v)
    b_s, q, b_o = update_state(b_s, p_s, q, k, v, decay_minus_one, theta, position, 0, head_of, D, BD, BE)
    _store_tagged(o + head_of * D + e, b_o + tl.sum(tl.where(m_d, q[:, None] * b_s, 0.0), 0), seq + 1, e < D)
    tl.store(p_s, b_s, mask=m_d)


@triton.jit
def _argmax_reduce(high, row, best, tokens, top_logit, P):
    """tokens, top_logit = row and value of the largest `high` [R] of all programs; the first of equal ones, NaN above all.

    `best` is two words: the largest so far, as an integer that orders like (value, -row), and how many programs have
    contributed. The last of them writes the result and resets both.
    """
    bits = high.to(tl.int32, bitcast=True)
    bits = tl.where(high != high, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    tl.atomic_max(best, tl.max((bits.to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64), 0))
    if tl.atomic_add(best + 1, 1) == P - 1:
        word = tl.atomic_xchg(best, -0x7FFFFFFFFFFFFFFF)
        tl.store(best + 1, 0)
        order = (word >> 32).to(tl.int32)
        tl.store(tokens, 0x7FFFFFFF - (word & 0x7FFFFFFF))
        tl.store(top_logit, tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True))


# Complexity 33: the phases of a layer, unrolled at compile time; split over functions they would hide their order.
@triton.jit
def _decode_narrow_kernel(  # noqa: C901
    tokens, position, embedding, head, log_decay, table, x, qkvu, o, h, residual, logits, steps, best, top_logit,
    num_choices, num_layers, H, V, scale, eps,
    P: tl.constexpr, M: tl.constexpr, F: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    RING: tl.constexpr, AHEAD: tl.constexpr, START: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    SINGLE_PROGRAM: tl.constexpr, SPIN_WAIT: tl.constexpr, SPIN_WAIT_1: tl.constexpr,
    SILU: tl.constexpr, SILU_VALUE: tl.constexpr, SILU_GLU: tl.constexpr,
):  # fmt: skip
    """Grid (P,), all resident at once. `DecodeModel` and `NarrowDecodeStep` say what the arguments are.

    x [M], qkvu [4M], o [M] and h [F] are tagged words; `residual` [M] is x as plain fp32, each row for the program that
    owns it. steps [P] counts the steps each program has done.
    """
    DTYPE: tl.constexpr = embedding.dtype.element_ty
    NC: tl.constexpr = (M + C * 256 - 1) // (C * 256)
    NF: tl.constexpr = (F + C * 256 - 1) // (C * 256)
    pid = tl.program_id(0)
    # A layer's five results are tagged seq, seq + 1, ...; the x it starts from is tagged seq - 1, at first the embedding.
    step = tl.load(steps + pid)
    seq = step * (5 * num_layers + 1) + 2
    ring = ()
    for s in tl.static_range(RING):
        ring = ring + (_fetch(s, True, table, 0, num_layers, V, P, DTYPE, START, C, R, M, F),)
    for s in tl.static_range(AHEAD):
        _fetch(RING + s, False, table, 0, num_layers, V, P, DTYPE, START, C, R, M, F)
    lane = tl.arange(0, 32)[None, :]
    for tile in tl.static_range((M + P * R - 1) // (P * R)):
        r = program_rows(tile, P, R)
        mask = (r < M)[:, None] & (lane == 0)
        b_x = tl.load(embedding + tl.load(tokens) * M + r[:, None] + lane, mask=mask, other=0.0).to(tl.float32) * scale
        tl.store(residual + r[:, None] + lane, b_x, mask=mask)
        _store_tagged(x + r[:, None] + lane, b_x, seq - 1, mask)

    for layer in range(num_layers):
        acc = tl.zeros([R, 256], tl.float32)
        acc_gate = tl.zeros([R, 256], tl.float32)
        # q, k, v, u. Many units run in a loop, but for the last few: the code must fit into the instruction cache.
        ys, squares = _read_vector(x, seq - 1, C, R, M, SINGLE_PROGRAM, SPIN_WAIT)
        inverse_rms = tl.rsqrt(squares / M + eps)
        # Triton 3.6 takes an element of a tuple for a loop's bound only once it has a name.
        UNITS_QKVU: tl.constexpr = START[1]
        LOOP_QKVU: tl.constexpr = (UNITS_QKVU // RING - 1) * RING if UNITS_QKVU >= 4 * RING else 0
        w = load_pointer(table, layer, QKVU, DTYPE)
        for base in range(0, LOOP_QKVU, RING):
            for j in tl.static_range(RING):
                acc = _accumulate(ring[0], ys[j % NC], acc, j % NC)
                if j % NC == NC - 1:
                    r = program_rows((base + j) // NC, P, R)
                    _store_row(qkvu, seq, None, r, tl.sum(acc, 1) * inverse_rms, 4 * M, True, R)
                if AHEAD > 0:
                    _prefetch_unit(w, 4 * M, base + j + RING + AHEAD, P, C, R, M, 0)
                ring = ring[1:] + (_load_unit(w, 4 * M, base + j + RING, P, C, R, M, 0),)
        for j in tl.static_range(LOOP_QKVU, UNITS_QKVU):
            acc = _accumulate(ring[0], ys[j % NC], acc, j % NC)
            if j % NC == NC - 1:
                r = program_rows(j // NC, P, R)
                _store_row(qkvu, seq, None, r, tl.sum(acc, 1) * inverse_rms, 4 * M, True, R)
            ring = _advance(ring, j, AHEAD, table, layer, num_layers, V, P, DTYPE, START, C, R, M, F)

        p_state = load_pointer(table, layer, STATE, tl.float32)
        theta = tl.load(table + layer * NUM_COLUMNS + THETA)
        for item in range(pid, H * (D // BE), P):
            _update_state_tile(
                p_state, theta, log_decay + layer * H, position, qkvu, o, seq, item,
                M, D, BD, BE, SILU, SILU_VALUE, SINGLE_PROGRAM, SPIN_WAIT_1,
            )  # fmt: skip

        # x += W (norm(o) * u)
        us, _ = _read_vector(qkvu + 3 * M, seq, C, R, M, SINGLE_PROGRAM, SPIN_WAIT)
        ys, squares = _read_vector(o, seq + 1, C, R, M, SINGLE_PROGRAM, SPIN_WAIT)
        inverse_rms = tl.rsqrt(squares / M + eps)
        UNITS_OUT: tl.constexpr = START[2] - START[1]
        for j in tl.static_range(UNITS_OUT):
            acc = _accumulate(ring[0], ys[j % NC] * us[j % NC], acc, j % NC)
            if j % NC == NC - 1:
                r = program_rows(j // NC, P, R)
                _store_row(x, seq + 2, residual, r, tl.sum(acc, 1) * inverse_rms, M, True, R)
            ring = _advance(ring, START[1] + j, AHEAD, table, layer, num_layers, V, P, DTYPE, START, C, R, M, F)

        # h = act(W_1 y) * (W_2 y), units of W_1 and W_2 in turn
        ys, squares = _read_vector(x, seq + 2, C, R, M, SINGLE_PROGRAM, SPIN_WAIT)
        inverse_rms = tl.rsqrt(squares / M + eps)
        UNITS_UP: tl.constexpr = START[3] - START[2]
        LOOP_UP: tl.constexpr = (UNITS_UP // RING - 1) * RING if UNITS_UP >= 4 * RING and RING % 2 == 0 else 0
        w, w_gate = load_pointer(table, layer, UP, DTYPE), load_pointer(table, layer, GATE, DTYPE)
        for base in range(0, LOOP_UP, RING):
            for j in tl.static_range(RING):
                if j % 2 == 0:
                    acc = _accumulate(ring[0], ys[j // 2 % NC], acc, j // 2 % NC)
                else:
                    acc_gate = _accumulate(ring[0], ys[j // 2 % NC], acc_gate, j // 2 % NC)
                    if j // 2 % NC == NC - 1:
                        r = program_rows((base + j) // 2 // NC, P, R)
                        _store_gated_row(h, seq + 3, r, acc, acc_gate, inverse_rms, F, SILU_GLU, R)
                if AHEAD > 0:
                    _prefetch_unit(
                        w if (j + AHEAD) % 2 == 0 else w_gate, F, (base + j + RING + AHEAD) // 2, P, C, R, M, 0
                    )
                ring = ring[1:] + (_load_unit(w if j % 2 == 0 else w_gate, F, (base + j + RING) // 2, P, C, R, M, 0),)
        for j in tl.static_range(LOOP_UP, UNITS_UP):
            if j % 2 == 0:
                acc = _accumulate(ring[0], ys[j // 2 % NC], acc, j // 2 % NC)
            else:
                acc_gate = _accumulate(ring[0], ys[j // 2 % NC], acc_gate, j // 2 % NC)
                if j // 2 % NC == NC - 1:
                    r = program_rows(j // 2 // NC, P, R)
                    _store_gated_row(h, seq + 3, r, acc, acc_gate, inverse_rms, F, SILU_GLU, R)
            ring = _advance(ring, START[2] + j, AHEAD, table, layer, num_layers, V, P, DTYPE, START, C, R, M, F)

        # x += W_3 h, chunk by chunk of h, which is too long for registers; the first LEAD chunks are loaded in advance.
        T: tl.constexpr = (START[4] - START[3]) // NF
        LEAD: tl.constexpr = 3 if NF > 3 else NF
        k = tl.arange(0, C * 256)
        loaded, sums = (), ()
        for c in tl.static_range(LEAD):
            loaded = loaded + (_load_volatile(h + tl.minimum(c * C * 256 + k, F - 1)),)
        for _ in tl.static_range(T):
            sums = sums + (tl.zeros([R, 256], tl.float32),)
        for c in tl.static_range(NF):
            p_h = h + tl.minimum(c * C * 256 + k, F - 1)
            y = _wait_tagged(loaded[0], p_h, seq + 3, SINGLE_PROGRAM, SPIN_WAIT)
            loaded = loaded[1:]
            if c + LEAD < NF:
                loaded = loaded + (_load_volatile(h + tl.minimum((c + LEAD) * C * 256 + k, F - 1)),)
            y = _broadcast(tl.where(c * C * 256 + k < F, y, 0.0), C, R)
            for t in tl.static_range(T):
                sums = sums[1:] + (_accumulate(ring[0], y, sums[0], 1),)
                ring = _advance(
                    ring, START[3] + c * T + t, AHEAD, table, layer, num_layers, V, P, DTYPE, START, C, R, M, F
                )
        for t in tl.static_range(T):
            _store_row(x, seq + 4, residual, program_rows(t, P, R), tl.sum(sums[t], 1), M, True, R)
        seq += 5

    ys, squares = _read_vector(x, seq - 1, C, R, M, SINGLE_PROGRAM, SPIN_WAIT)
    inverse_rms = tl.rsqrt(squares / M + eps)
    acc = tl.zeros([R, 256], tl.float32)
    high, high_row = tl.full([R], float("-inf"), tl.float32), tl.zeros([R], tl.int32)
    for base in range(0, tl.cdiv(V, P * R) * NC, RING):
        for j in tl.static_range(RING):
            acc = _accumulate(ring[0], ys[j % NC], acc, j % NC)
            if j % NC == NC - 1:
                r = program_rows((base + j) // NC, P, R)
                result = tl.sum(acc, 1) * inverse_rms
                _store_row(logits, seq, None, r, result, V, False, R)
                higher = (r < num_choices) & ((result > high) | (result != result))
                high, high_row = tl.where(higher, result, high), tl.where(higher, r, high_row)
            if AHEAD > 0:
                _prefetch_unit(head, V, base + j + RING + AHEAD, P, C, R, M, 0)
            ring = ring[1:] + (_load_unit(head, V, base + j + RING, P, C, R, M, 0),)
    _argmax_reduce(high, high_row, best, tokens, top_logit, P)
    tl.debug_barrier()
    tl.store(steps + pid, step + 1)
    if pid == 0:
        tl.store(position, tl.load(position) + 1)


def _tagged_vectors(widths: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Vectors of zero words, contiguous, the first of them 3.5 KB after a multiple of 2 MB.

    All SMs poll the same few kilobytes, so it matters how these map to the slices of L2. On an H100 a step of 385M took
    0.448 to 0.452 ms at this offset and 0.47 at the multiple itself; where the allocator puts them, something between, on
    three of these GPUs. At 1B it makes no difference.
    """
    if device.type == "cpu":
        return [torch.zeros(width, dtype=torch.int64) for width in widths]
    page = 1 << 21
    buffer = torch.zeros((page + 3584) // 8 + sum(widths), dtype=torch.int64, device=device)
    first = (-buffer.data_ptr() % page + 3584) // 8
    return list(buffer[first : first + sum(widths)].split(widths))


class NarrowDecodeStep:
    """As `wide.WideDecodeStep`, for a batch of 1 and a model for which `fits` holds. The kernel itself takes the argmax."""

    def __init__(self, model: DecodeModel) -> None:
        self.model, device = model, model.head.device
        _, V, M, F, H, D = model.sizes
        P, R = num_programs(device), _NUM_WARPS
        self.tokens, self.logits, self.top_logit = model.outputs()
        best = torch.tensor([-(2**63) + 1, 0], device=device)
        # The head is the first matrix of the layer after the last.
        table = model.address_table()
        table.append([model.head.data_ptr()] + [0] * (len(table[0]) - 1))
        words = _tagged_vectors((M, 4 * M, M, F), device)
        self._grid = (P,)
        self._arguments = (
            self.tokens, model.position, model.embedding, model.head, model.log_decay,
            torch.tensor(table, device=device), *words, torch.zeros(M, device=device), self.logits,
            torch.zeros(P, dtype=torch.int32, device=device), best, self.top_logit,
            model.num_choices, len(model.layers), H, V, model.scale, model.eps,
        )  # fmt: skip
        power, cdiv = triton.next_power_of_2, triton.cdiv
        C, NC = chunks(M, model.head.element_size())
        RING, AHEAD = _DEPTH[NC]
        tiles = cdiv(M, P * R)
        # Units of qkvu, out, up and gate, down.
        units = (max(RING, cdiv(4 * M, P * R) * NC), tiles * NC, 2 * cdiv(F, P * R) * NC, tiles * cdiv(F, 256 * C))
        self._sizes = {
            "P": P, "M": M, "F": F, "D": D, "BD": power(D), "BE": min(power(cdiv(H * D, P)), D & -D),
            "RING": RING, "AHEAD": AHEAD if model.prefetches(alignment=16) and P > 1 else 0,
            "START": tuple(itertools.accumulate(units, initial=0)), "C": C, "R": R,
            "SINGLE_PROGRAM": P == 1, "SPIN_WAIT": _spin_wait_ptx(C), "SPIN_WAIT_1": _spin_wait_ptx(1),
            "SILU": model.silu[0], "SILU_VALUE": model.silu[1], "SILU_GLU": model.silu[2],
        }  # fmt: skip

    def __call__(self) -> None:
        options = launch_options(self.tokens.device)
        _decode_narrow_kernel[self._grid](
            *self._arguments, **self._sizes, num_warps=_NUM_WARPS, num_stages=1, **options
        )
