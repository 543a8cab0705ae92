"""Lightning Attention on the GPU: three Triton kernels that serve forward and backward alike.

All four results have one form. With out = attend(a, b, c), out_t = sum over s <= t of decay^(t-s) (a_t .
b_s) c_s:

    o  = attend(q, k, v)                    dk = attend(v, do, q)  with time running backward
    dq = attend(do, v, k)                   dv = attend(k, q, do)  with time running backward

Where time runs backward the rows of a chunk are numbered from its end. Nothing else changes, except that a
key meets the gradient of the state after it where a query meets the state before it: one factor of the decay
less.

`attend_kernel` walks a segment of tokens chunk by chunk with the state S [A, BC] (A the width of a and b, BC
columns of c) in fp32 registers. A sequence with few heads is cut in segments that run side by side. For
these, `piece_states_kernel` computes what each piece of a segment adds to the state, in many small programs,
and `scan_states_kernel` turns that into the state before each piece. `launch.py` calls them. Token and
sequence numbers here count in the direction of the walk.
"""

import triton
import triton.language as tl

# Terms that decayed by this power of two are left out of a state. The sum of fresh terms rounds at 2^-24 in fp32; where it
# came from 16-bit inputs, by whose rounding results are off by 2^-9, that is enough.
NEGLIGIBLE_LOG2_16_BIT = tl.constexpr(24.0)
NEGLIGIBLE_LOG2_32_BIT = tl.constexpr(32.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(cu_ptr, n, num_seqs, T, REVERSE: tl.constexpr):
    """First token of sequence n; T for n = num_seqs."""
    if REVERSE:
        return T - tl.load(cu_ptr + num_seqs - n)
    else:
        return tl.load(cu_ptr + n)


@triton.jit
def _sequence_at(cu_ptr, t, num_seqs, T, REVERSE: tl.constexpr):
    """The sequence that holds token t: the last one that starts at or before t, so never an empty one."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if _start(cu_ptr, middle, num_seqs, T, REVERSE) <= t:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _load_tile(
    ptr,
    row_stride,
    token,
    rows,
    cols,
    MASK_ROWS: tl.constexpr,
    MASK_COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[CHUNK, BLOCK] from `token` on; zero from row `rows` and column `cols` on where masked."""
    r = tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    ptrs = ptr + token.to(tl.int64) * row_stride + (r * row_stride + d)
    if MASK_ROWS:
        return tl.load(ptrs, mask=(r < rows) & (d < cols), other=0.0)
    elif MASK_COLS:
        return tl.load(ptrs, mask=d < cols, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_tile(
    ptr,
    x,
    row_stride,
    token,
    rows,
    cols,
    MASK_ROWS: tl.constexpr,
    MASK_COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.arange(0, CHUNK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    ptrs = ptr + token.to(tl.int64) * row_stride + (r * row_stride + d)
    x = x.to(ptr.dtype.element_ty)
    if MASK_ROWS:
        tl.store(ptrs, x, mask=(r < rows) & (d < cols))
    elif MASK_COLS:
        tl.store(ptrs, x, mask=d < cols)
    else:
        tl.store(ptrs, x)


@triton.jit
def _state_tile(first_col, transposed, A: tl.constexpr, N: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr):
    """Offsets and mask of this program's [BA, BC] of a state [A, N]. In memory a state is
    always [D, E]; where `transposed` the [A, N] seen here is its transpose."""
    i = tl.arange(0, BA)[:, None]
    j = first_col + tl.arange(0, BC)[None, :]
    row_stride = tl.where(transposed, 1, N)
    col_stride = tl.where(transposed, A, 1)
    return i * row_stride + j * col_stride, (i < A) & (j < N)


@triton.jit
def _chunk(
    ptrs,
    row_strides,
    descriptors,
    token,
    state,
    g,
    b_decay,
    rows,
    cols,
    MASK_ROWS: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the outputs of the chunk of `rows` tokens at `token`; return the state after it.

    ptrs, row_strides, descriptors: of a, b, c and o. b_decay [CHUNK]: `to_end` of a whole chunk (used with TMA).
    """
    MASK_A: tl.constexpr = BA != A
    MASK_C: tl.constexpr = N % BC != 0
    a_ptr, b_ptr, c_ptr, o_ptr = ptrs
    a_t, b_t, c_t, o_t = row_strides
    a_desc, b_desc, c_desc, o_desc = descriptors
    r = tl.arange(0, CHUNK)
    if REVERSE:
        r = rows - 1 - r
    gap = r[:, None] - r[None, :]
    decay = tl.where(gap >= 0, tl.exp2(g * tl.maximum(gap, 0).to(tl.float32)), 0.0)
    from_start = tl.exp2(g * tl.maximum(r + 1 - REVERSE, 0).to(tl.float32))
    to_end = tl.exp2(g * tl.maximum(rows - 1 - r + REVERSE, 0).to(tl.float32))
    over_chunk = tl.exp2(g * (rows * 1.0))

    if TMA and not MASK_ROWS:
        a = a_desc.load([token, 0])
        b = b_desc.load([token, 0])
        c = c_desc.load([token, 0])
    else:
        a = _load_tile(a_ptr, a_t, token, rows, A, MASK_ROWS, MASK_A, CHUNK, BA)
        b = _load_tile(b_ptr, b_t, token, rows, A, MASK_ROWS, MASK_A, CHUNK, BA)
        c = _load_tile(c_ptr, c_t, token, rows, cols, MASK_ROWS, MASK_C, CHUNK, BC)
    dtype = a.dtype
    narrow = state.to(dtype)
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * decay
    out = tl.dot(a, narrow, input_precision=PRECISION) * from_start[:, None]
    out = tl.dot(scores.to(dtype), c, out, input_precision=PRECISION)
    if TMA and not MASK_ROWS:
        o_desc.store([token, 0], out.to(dtype))
    else:
        _store_tile(o_ptr, out, o_t, token, rows, cols, MASK_ROWS, MASK_C, CHUNK, BC)
    state *= over_chunk
    if TMA:
        late = (tl.trans(b).to(tl.float32) * (to_end if MASK_ROWS else b_decay)[None, :]).to(dtype)
        return tl.dot(late, c, state, input_precision=PRECISION)
    late = (c.to(tl.float32) * to_end[:, None]).to(dtype)
    return tl.dot(tl.trans(b), late, state, input_precision=PRECISION)


@triton.jit
def _walk(
    ptrs,
    row_strides,
    descriptors,
    t,
    stop,
    T,
    state,
    g,
    b_decay,
    cols,
    RAGGED: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend over tokens t to stop of one sequence."""
    num_chunks = (stop - t) // CHUNK
    for i in range(num_chunks):
        token = t + i * CHUNK
        if REVERSE:
            token = T - CHUNK - token
        state = _chunk(
            ptrs,
            row_strides,
            descriptors,
            token,
            state,
            g,
            b_decay,
            CHUNK,
            cols,
            False,
            A,
            N,
            BA,
            BC,
            CHUNK,
            REVERSE,
            TMA,
            PRECISION,
        )
    if RAGGED:
        rows = (stop - t) % CHUNK
        if rows > 0:
            token = T - stop if REVERSE else stop - rows
            state = _chunk(
                ptrs,
                row_strides,
                descriptors,
                token,
                state,
                g,
                b_decay,
                rows,
                cols,
                True,
                A,
                N,
                BA,
                BC,
                CHUNK,
                REVERSE,
                TMA,
                PRECISION,
            )
    return state


@triton.jit(do_not_specialize=["T", "H", "segment", "slots_per_segment", "num_slots", "num_seqs"])
def attend_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    o_ptr,
    a2_ptr,
    o2_ptr,
    log_decay_ptr,
    b_decay_ptr,
    initial_ptr,
    before_ptr,
    final_ptr,
    cu_ptr,
    a_b,
    a_t,
    a_h,
    b_b,
    b_t,
    b_h,
    c_b,
    c_t,
    c_h,
    o_b,
    o_t,
    o_h,
    a2_b,
    a2_t,
    a2_h,
    o2_b,
    o2_t,
    o2_h,
    T,
    H,
    segment,
    slots_per_segment,
    num_slots,
    num_seqs,
    A: tl.constexpr,
    N: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    DUAL: tl.constexpr,
    STATE_TRANSPOSED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (heads x column splits, segments, batch). o = attend(a, b, c).

    With DUAL the first axis is twice as long and every second program does o2 = attend(a2, c, b) instead: dk
    and dv then run side by side, and what one reads the other finds in the L2 cache. A = N is needed for
    that.

    initial, final [num_seqs, H, D, E] fp32: states before and after each sequence (None unless HAS_, STORE_).
    before [B, H, num_slots, D, E] fp32, from scan_states_kernel: every slots_per_segment-th is a segment's.
    b_decay [H, CHUNK] fp32, scratch; None without TMA.
    """
    SPLITS: tl.constexpr = tl.cdiv(N, BC)
    program = tl.program_id(0)
    first_of_dual = True
    if DUAL:
        first_of_dual = program % 2 == 0
        program = program // 2
    head = (program // SPLITS).to(tl.int64)
    first_col = program % SPLITS * BC
    seg = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    g = tl.load(log_decay_ptr + head) * LOG2E
    cols = N - first_col
    a_ptr += row * a_b + head * a_h
    b_ptr += row * b_b + head * b_h
    c_ptr += row * c_b + head * c_h
    o_ptr += row * o_b + head * o_h
    transposed = STATE_TRANSPOSED
    if DUAL:  # noqa: SIM102 (the outer test is made by the compiler)
        if not first_of_dual:
            transposed = not STATE_TRANSPOSED
            a_ptr, a_t = a2_ptr + row * a2_b + head * a2_h, a2_t
            o_ptr, o_t = o2_ptr + row * o2_b + head * o2_h, o2_t
            b_ptr, b_t, c_ptr, c_t = c_ptr, c_t, b_ptr, b_t
    c_ptr += first_col
    o_ptr += first_col
    ptrs = (a_ptr, b_ptr, c_ptr, o_ptr)
    row_strides = (a_t, b_t, c_t, o_t)
    descriptors = ptrs
    b_decay = g
    if TMA:
        descriptors = (
            tl.make_tensor_descriptor(a_ptr, [T, A], [a_t, 1], [CHUNK, BA]),
            tl.make_tensor_descriptor(b_ptr, [T, A], [b_t, 1], [CHUNK, BA]),
            tl.make_tensor_descriptor(c_ptr, [T, cols], [c_t, 1], [CHUNK, BC]),
            tl.make_tensor_descriptor(o_ptr, [T, cols], [o_t, 1], [CHUNK, BC]),
        )
        # Through memory, since Triton takes a left operand straight from shared memory into registers only if all that
        # it is computed from was loaded. All programs of a head write the same.
        r = tl.arange(0, CHUNK)
        to_end = r + 1 if REVERSE else CHUNK - 1 - r
        tl.store(b_decay_ptr + head * CHUNK + r, tl.exp2(g * to_end.to(tl.float32)))
        tl.debug_barrier()
        b_decay = tl.load(b_decay_ptr + head * CHUNK + r)

    offsets, mask = _state_tile(first_col, transposed, A, N, BA, BC)
    begin = seg * segment
    end = tl.minimum(begin + segment, T)
    state = tl.zeros([BA, BC], tl.float32)
    if HAS_BEFORE:
        slot = (row * H + head) * num_slots + seg * slots_per_segment
        state = tl.load(before_ptr + slot * (A * N) + offsets, mask=mask, other=0.0)
    if PACKED:
        n = _sequence_at(cu_ptr, begin, num_seqs, T, REVERSE)
        t = begin
        while t < end:
            while _start(cu_ptr, n + 1, num_seqs, T, REVERSE) <= t:
                n += 1
            next_start = _start(cu_ptr, n + 1, num_seqs, T, REVERSE)
            stop = tl.minimum(next_start, end)
            real = num_seqs - 1 - n if REVERSE else n
            slot = (real * H + head) * (A * N)
            if _start(cu_ptr, n, num_seqs, T, REVERSE) == t:
                if HAS_INITIAL:
                    state = tl.load(initial_ptr + slot + offsets, mask=mask, other=0.0)
                else:
                    state = tl.zeros_like(state)
            state = _walk(
                ptrs,
                row_strides,
                descriptors,
                t,
                stop,
                T,
                state,
                g,
                b_decay,
                cols,
                RAGGED,
                A,
                N,
                BA,
                BC,
                CHUNK,
                REVERSE,
                TMA,
                PRECISION,
            )
            if STORE_FINAL:  # noqa: SIM102
                if stop == next_start and first_of_dual:
                    tl.store(final_ptr + slot + offsets, state, mask=mask)
            t = stop
    else:
        slot = (row * H + head) * (A * N)
        if HAS_INITIAL and not HAS_BEFORE:
            state = tl.load(initial_ptr + slot + offsets, mask=mask, other=0.0)
        state = _walk(
            ptrs,
            row_strides,
            descriptors,
            begin,
            end,
            T,
            state,
            g,
            b_decay,
            cols,
            RAGGED,
            A,
            N,
            BA,
            BC,
            CHUNK,
            REVERSE,
            TMA,
            PRECISION,
        )
        if STORE_FINAL:  # noqa: SIM102
            if end == T and first_of_dual:
                tl.store(final_ptr + slot + offsets, state, mask=mask)


@triton.jit(do_not_specialize=["T", "H", "piece", "offset", "num_seqs"])
def piece_states_kernel(
    b_ptr,
    c_ptr,
    log_decay_ptr,
    initial_ptr,
    added_ptr,
    carries_ptr,
    cu_ptr,
    b_b,
    b_t,
    b_h,
    c_b,
    c_t,
    c_h,
    T,
    H,
    piece,
    offset,
    num_seqs,
    A: tl.constexpr,
    N: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    STATE_TRANSPOSED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (heads x column splits, pieces, batch): what each piece of tokens adds to the state.

    The first piece is `offset` tokens shorter (RAGGED; 0 else). added [B, H, pieces + 1, D, E]: slot i + 1 gets the state
    after piece i had the state before it been zero. carries [pieces + 1]: 1 where the sequence at the piece's end began
    before the piece, else 0.
    """
    SPLITS: tl.constexpr = tl.cdiv(N, BC)
    head = (tl.program_id(0) // SPLITS).to(tl.int64)
    first_col = tl.program_id(0) % SPLITS * BC
    index = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    g = tl.load(log_decay_ptr + head) * LOG2E
    end = index * piece + piece - offset
    begin = tl.maximum(end - piece, 0)
    fresh = False
    start = begin
    if PACKED:
        n = _sequence_at(cu_ptr, end - 1, num_seqs, T, REVERSE)
        start = _start(cu_ptr, n, num_seqs, T, REVERSE)
        fresh = start >= begin
        tl.store(carries_ptr + index, tl.where(fresh, 0, 1))
    # Only tokens whose share has not decayed to nothing by the piece's end; whole chunks of them. At least one: the last
    # token's share has not decayed at all.
    NEGLIGIBLE: tl.constexpr = (
        NEGLIGIBLE_LOG2_32_BIT if b_ptr.dtype.element_ty == tl.float32 else NEGLIGIBLE_LOG2_16_BIT
    )
    window = tl.minimum(NEGLIGIBLE / tl.maximum(-g, 1e-9), piece * 1.0).to(tl.int32)
    window = tl.cdiv(window + 1, CHUNK) * CHUNK
    first = tl.maximum(tl.maximum(begin, start), end - window)

    b_ptr += row * b_b + head * b_h
    c_ptr += row * c_b + head * c_h + first_col
    cols = N - first_col
    r = tl.arange(0, CHUNK)
    state = tl.zeros([BA, BC], tl.float32)
    rows = 0
    if RAGGED:
        rows = (end - first) % CHUNK
        if rows > 0:
            token = T - first - rows if REVERSE else first
            b = _load_tile(b_ptr, b_t, token, rows, A, True, True, CHUNK, BA)
            c = _load_tile(c_ptr, c_t, token, rows, cols, True, True, CHUNK, BC)
            to_end = r + 1 if REVERSE else tl.maximum(rows - 1 - r, 0)
            late = (c.to(tl.float32) * tl.exp2(g * to_end.to(tl.float32))[:, None]).to(c.dtype)
            state = tl.dot(tl.trans(b), late, input_precision=PRECISION)
    to_end = tl.exp2(g * (r + 1 if REVERSE else CHUNK - 1 - r).to(tl.float32))
    over_chunk = tl.exp2(g * CHUNK)
    for i in range((end - first) // CHUNK):
        token = first + rows + i * CHUNK
        if REVERSE:
            token = T - CHUNK - token
        b = _load_tile(b_ptr, b_t, token, CHUNK, A, False, BA != A, CHUNK, BA)
        c = _load_tile(c_ptr, c_t, token, CHUNK, cols, False, N % BC != 0, CHUNK, BC)
        late = (c.to(tl.float32) * to_end[:, None]).to(c.dtype)
        state = tl.dot(tl.trans(b), late, state * over_chunk, input_precision=PRECISION)
    offsets, mask = _state_tile(first_col, STATE_TRANSPOSED, A, N, BA, BC)
    if PACKED and HAS_INITIAL:  # noqa: SIM102
        if fresh:
            real = num_seqs - 1 - n if REVERSE else n
            slot = (real * H + head) * (A * N)
            initial = tl.load(initial_ptr + slot + offsets, mask=mask, other=0.0)
            state += initial * tl.exp2(g * (end - start).to(tl.float32))
    slot = (row * H + head) * (tl.num_programs(1) + 1) + index + 1
    tl.store(added_ptr + slot * (A * N) + offsets, state, mask=mask)


@triton.jit(do_not_specialize=["H", "piece", "num_slots"])
def scan_states_kernel(
    states_ptr,
    log_decay_ptr,
    initial_ptr,
    carries_ptr,
    H,
    piece,
    num_slots,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (SIZE / BLOCK, B * H): turn what each piece adds into the state before each piece, in place.

    states [B * H, num_slots, SIZE] with SIZE = D * E; slot 0 becomes the initial state, or zero. GROUP slots
    are read at once: reading one after another would wait for memory at each.
    """
    head_row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g_piece = tl.load(log_decay_ptr + head_row % H) * LOG2E * piece
    states_ptr += head_row * num_slots * SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL and not PACKED:
        state = tl.load(initial_ptr + head_row * SIZE + i)
    tl.store(states_ptr + i, state)
    j = tl.arange(0, GROUP)
    gap = j[:, None] - j[None, :]
    for first in range(1, num_slots, GROUP):
        slot = first + j
        there = slot < num_slots
        ptrs = states_ptr + slot[:, None] * SIZE + i[None, :]
        added = tl.load(ptrs, mask=there[:, None], other=0.0)
        share = tl.where(gap >= 0, tl.exp2(g_piece * tl.maximum(gap, 0).to(tl.float32)), 0.0)
        share_before = tl.exp2(g_piece * (j + 1).to(tl.float32))
        if PACKED:
            resets = tl.cumsum(1 - tl.load(carries_ptr + slot - 1, mask=there, other=1), 0)
            share = tl.where(resets[:, None] == resets[None, :], share, 0.0)
            share_before = tl.where(resets == 0, share_before, 0.0)
        states = tl.sum(share[:, :, None] * added[None, :, :], 1) + share_before[:, None] * state[None, :]
        tl.store(ptrs, states, mask=there[:, None])
        state = tl.sum(tl.where(slot[:, None] == first + GROUP - 1, states, 0.0), 0)
