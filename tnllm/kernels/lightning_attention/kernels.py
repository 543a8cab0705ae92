"""Lightning Attention on the GPU: the Triton kernel that serves forward and backward alike.

All four results have one form. With out = attend(a, b, c), out_t = sum over s <= t of decay^(t-s) (a_t . b_s) c_s:

    o  = attend(q, k, v)                    dk = attend(v, do, q)  with time reversed
    dq = attend(do, v, k)                   dv = attend(k, q, do)  with time reversed

With time reversed (REVERSE) the rows of a chunk are numbered from its end, token and sequence indices from the end of the
row. The only other change: a key sees the gradient of the state *after* its token, where a query sees the state before
it, so there is one factor of the decay less.

D is the width of a and b here, E that of c: for dq and dk they are the operator's E and D.

`attend_kernel` scans the chunks of its tokens with the state S [D, BE] (BE columns of c) in fp32 registers. With few
heads a sequence is cut in splits, scanned by programs side by side, each from the state that `states.py` computes.
`launch.py` calls the kernels of both.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(
    ptr, row_stride, token, rows, cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """[CHUNK, BLOCK] starting at `token`; with masks, rows >= `rows` and columns >= `cols` are zero."""
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
    ptr, x, row_stride, token, rows, cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
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
def _state_tile(first_col, transposed, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Offsets and mask of this program's [BD, BE] tile of a state [D, E], stored as [E, D] if `transposed`."""
    i = tl.arange(0, BD)[:, None]
    j = first_col + tl.arange(0, BE)[None, :]
    row_stride = tl.where(transposed, 1, E)
    col_stride = tl.where(transposed, D, 1)
    return i * row_stride + j * col_stride, (i < D) & (j < E)


@triton.jit
def _transposed_tile(
    first_col, first_row, transposed, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr
):
    """Offsets and mask of a [BE, BD] tile of the transpose of a state [D, E], stored as [E, D] if `transposed`."""
    i = first_row + tl.arange(0, BD)[None, :]
    j = first_col + tl.arange(0, BE)[:, None]
    return i * tl.where(transposed, 1, E) + j * tl.where(transposed, D, 1), (i < D) & (j < E)


@triton.jit
def _chunk(
    ptrs, row_strides, descriptors, token, state, g, b_decay, rows, cols, layout, initial,
    MASK_ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Write the outputs of the chunk of `rows` tokens at `token`; return the state after it.

    ptrs, row_strides, descriptors: of a, b, c and o. b_decay: `to_end` of a full chunk, [CHUNK], or with PACKED where it
    is stored. descriptors and b_decay are read only with TMA; layout (`lead`, `tail`, and where the bounds of tokens lie)
    and initial only with PACKED.
    """
    MASK_D: tl.constexpr = BD != D
    MASK_E: tl.constexpr = E % BE != 0
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
    if PACKED:
        lead, tail, edge_ptr = layout
        from_start = tl.where(r < lead, from_start, 0.0)
        to_end = tl.where(r >= tail, to_end, 0.0)
        over_chunk = tl.where(tail < 0, over_chunk, 0.0)

    if TMA and not MASK_ROWS:
        a = a_desc.load([token, 0])
        b = b_desc.load([token, 0])
        c = c_desc.load([token, 0])
    else:
        a = _load_tile(a_ptr, a_t, token, rows, D, MASK_ROWS, MASK_D, CHUNK, BD)
        b = _load_tile(b_ptr, b_t, token, rows, D, MASK_ROWS, MASK_D, CHUNK, BD)
        c = _load_tile(c_ptr, c_t, token, rows, cols, MASK_ROWS, MASK_E, CHUNK, BE)
    dtype = a.dtype
    rounded = state.to(dtype)
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * decay
    if PACKED:  # noqa: SIM102
        if lead < CHUNK:
            # One bound for each row instead of a sequence index for each row and column: fewer registers.
            edge = tl.load(edge_ptr + token + tl.arange(0, CHUNK))[:, None] - token
            m = tl.arange(0, CHUNK)[None, :]
            scores = tl.where(m < edge if REVERSE else m >= edge, scores, 0.0)
    out = tl.dot(a, rounded, input_precision=PRECISION) * from_start[:, None]
    out = tl.dot(scores.to(dtype), c, out, input_precision=PRECISION)
    if TMA and not MASK_ROWS:
        o_desc.store([token, 0], out.to(dtype))
    else:
        _store_tile(o_ptr, out, o_t, token, rows, cols, MASK_ROWS, MASK_E, CHUNK, BE)
    state *= over_chunk
    if PACKED and HAS_INITIAL:  # noqa: SIM102
        if tail >= 0:
            initial_ptr, index_ptr, initial_size, offsets, mask, _, _ = initial
            n = tl.load(index_ptr + token + (0 if REVERSE else rows - 1)).to(tl.int64)
            since = tl.exp2(g * (rows - tail).to(tl.float32))
            state = tl.load(initial_ptr + n * initial_size + offsets, mask=mask, other=0.0) * since
    if TMA:
        if MASK_ROWS:
            b_decay = to_end
        elif PACKED:
            b_decay = tl.load(b_decay + tl.arange(0, CHUNK), mask=r >= tail, other=0.0)
        decayed = (tl.trans(b).to(tl.float32) * b_decay[None, :]).to(dtype)
        return tl.dot(decayed, c, state, input_precision=PRECISION)
    decayed = (c.to(tl.float32) * to_end[:, None]).to(dtype)
    return tl.dot(tl.trans(b), decayed, state, input_precision=PRECISION)


@triton.jit
def _chunk_wide(
    ptrs, row_strides, descriptors, token, state, state2, g, rows, cols, layout, initial,
    MASK_ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BD2: tl.constexpr, BE: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """`_chunk` for D > 128 and 16 bits, by TMA: the state is two transposed tiles, [BE, BD] and [BE, BD2].

    All products are transposed, so that the state is the left operand, which comes from registers: as the right one it
    would take as much shared memory as a chunk of a, and a pipeline stage with it.
    """
    a_ptr, b_ptr, c_ptr, o_ptr = ptrs
    a_t, b_t, c_t, o_t = row_strides
    a_desc, b_desc, c_desc, o_desc, a2_desc, b2_desc = descriptors
    # 0, which Triton does not know: what depends on it is computed in each chunk and takes no registers between.
    zero = (token < 0).to(tl.int32)
    r = tl.arange(0, CHUNK) + zero
    if REVERSE:
        r = rows - 1 - r
    from_start = tl.exp2(g * tl.maximum(r + 1 - REVERSE, 0).to(tl.float32))
    over_chunk = tl.exp2(g * (rows * 1.0))
    if PACKED:
        lead, tail, edge_ptr = layout
        from_start = tl.where(r < lead, from_start, 0.0)
        over_chunk = tl.where(tail < 0, over_chunk, 0.0)
    if MASK_ROWS:
        a = _load_tile(a_ptr, a_t, token, rows, D, True, False, CHUNK, BD)
        b = _load_tile(b_ptr, b_t, token, rows, D, True, False, CHUNK, BD)
        a2 = _load_tile(a_ptr + BD, a_t, token, rows, D - BD, True, True, CHUNK, BD2)
        b2 = _load_tile(b_ptr + BD, b_t, token, rows, D - BD, True, True, CHUNK, BD2)
    else:
        a = a_desc.load([token, 0])
        b = b_desc.load([token, 0])
        a2 = a2_desc.load([token, BD])
        b2 = b2_desc.load([token, BD])
    dtype = a.dtype
    out = tl.dot(state.to(dtype), tl.trans(a))
    out = tl.dot(state2.to(dtype), tl.trans(a2), out) * from_start[None, :]
    scores = tl.dot(b, tl.trans(a))
    scores = tl.dot(b2, tl.trans(a2), scores)
    gap = r[None, :] - r[:, None]
    scores *= tl.where(gap >= 0, tl.exp2(g * tl.maximum(gap, 0).to(tl.float32)), 0.0)
    if PACKED:  # noqa: SIM102
        if lead < CHUNK:
            edge = tl.load(edge_ptr + token + tl.arange(0, CHUNK))[None, :] - token
            m = tl.arange(0, CHUNK)[:, None]
            scores = tl.where(m < edge if REVERSE else m >= edge, scores, 0.0)
    if MASK_ROWS:
        c = _load_tile(c_ptr, c_t, token, rows, cols, True, True, CHUNK, BE)
    else:
        c = c_desc.load([token, 0])
    out = tl.dot(tl.trans(c), scores.to(dtype), out)
    out = tl.trans(out.to(dtype))
    if MASK_ROWS:
        _store_tile(o_ptr, out, o_t, token, rows, cols, True, True, CHUNK, BE)
    else:
        o_desc.store([token, 0], out)
    state *= over_chunk
    state2 *= over_chunk
    to_end = tl.exp2(g * tl.maximum(rows - 1 - r + REVERSE, 0).to(tl.float32))
    if PACKED:
        to_end = tl.where(r >= tail, to_end, 0.0)
        if HAS_INITIAL:  # noqa: SIM102
            if tail >= 0:
                initial_ptr, index_ptr, initial_size, offsets, mask, offsets2, mask2 = initial
                n = tl.load(index_ptr + token + (0 if REVERSE else rows - 1)).to(tl.int64)
                since = tl.exp2(g * (rows - tail).to(tl.float32))
                initial_ptr += n * initial_size
                state = tl.load(initial_ptr + offsets, mask=mask, other=0.0) * since
                state2 = tl.load(initial_ptr + offsets2, mask=mask2, other=0.0) * since
    decayed = tl.trans((c.to(tl.float32) * to_end[:, None]).to(dtype))
    return tl.dot(decayed, b, state), tl.dot(decayed, b2, state2)


@triton.jit
def _scan_chunks(
    ptrs, row_strides, descriptors, t, stop, T, state, state2, g, b_decay, cols, bounds, initial,
    RAGGED: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BD2: tl.constexpr, BE: tl.constexpr,
    CHUNK: tl.constexpr, REVERSE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Attend over tokens [t, stop) of a row, chunk by chunk; return the state after them. bounds: pointer and length."""
    num_chunks = (stop - t) // CHUNK
    bounds_ptr, bounds_size = bounds
    # The layout of a chunk is loaded one chunk ahead, and used as loaded, so that nothing waits for it.
    lead, tail = T, T
    layout_ptr, edge_ptr = bounds_ptr, bounds_ptr
    if PACKED:
        if REVERSE:
            edge_ptr += bounds_size
        layout_ptr += 3 * bounds_size + (REVERSE * (bounds_size // CHUNK) + t // CHUNK) * 2
        lead, tail = tl.load(layout_ptr), tl.load(layout_ptr + 1)
    for i in range(num_chunks):
        token = t + i * CHUNK
        if REVERSE:
            token = T - CHUNK - token
        layout = (lead, tail, edge_ptr)
        if PACKED:
            # Beyond the last chunk there is memory to read: two more entries.
            lead, tail = tl.load(layout_ptr + 2 * i + 2), tl.load(layout_ptr + 2 * i + 3)
        if BD2:
            state, state2 = _chunk_wide(
                ptrs, row_strides, descriptors, token, state, state2, g,
                CHUNK,
                cols, layout, initial,
                False,
                D, E, BD, BD2, BE, CHUNK, REVERSE, PACKED, HAS_INITIAL,
            )  # fmt: skip
        else:
            state = _chunk(
                ptrs, row_strides, descriptors, token, state, g, b_decay,
                CHUNK,
                cols, layout, initial,
                False,
                D, E, BD, BE, CHUNK, REVERSE, TMA, PRECISION, PACKED, HAS_INITIAL,
            )  # fmt: skip
    if RAGGED:
        rows = (stop - t) % CHUNK
        if rows > 0:
            token = T - stop if REVERSE else stop - rows
            layout = (lead, tail, edge_ptr)
            if BD2:
                state, state2 = _chunk_wide(
                    ptrs, row_strides, descriptors, token, state, state2, g, rows, cols, layout, initial,
                    True,
                    D, E, BD, BD2, BE, CHUNK, REVERSE, PACKED, HAS_INITIAL,
                )  # fmt: skip
            else:
                state = _chunk(
                    ptrs, row_strides, descriptors, token, state, g, b_decay, rows, cols, layout, initial,
                    True,
                    D, E, BD, BE, CHUNK, REVERSE, TMA, PRECISION, PACKED, HAS_INITIAL,
                )  # fmt: skip
    return state, state2


# Complexity: its branches are compile-time variants of one scan; a second kernel would repeat the scan.
@triton.jit(do_not_specialize=["T", "H", "split_len", "states_per_split", "num_states", "bounds_size"])
def attend_kernel(
    a_ptr, b_ptr, c_ptr, o_ptr, a2_ptr, o2_ptr, log_decay_ptr, b_decay_ptr, initial_ptr, before_ptr, final_ptr,
    bounds_ptr,
    a_b, a_t, a_h, b_b, b_t, b_h, c_b, c_t, c_h, o_b, o_t, o_h, a2_b, a2_t, a2_h, o2_b, o2_t, o2_h,
    T, H, split_len, states_per_split, num_states, bounds_size,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BD2: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, DUAL: tl.constexpr, STATE_TRANSPOSED: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_BEFORE: tl.constexpr, STORE_FINAL: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads x column blocks, splits, batch). o = attend(a, b, c).

    With DUAL the first axis is twice as long and every second program computes o2 = attend(a2, c, b) instead: dk and dv
    then run side by side, and one finds in the L2 cache what the other has read. Requires D = E.

    initial, final [num_seqs, H, D, E] fp32: states before and after each sequence (None without HAS_INITIAL, STORE_FINAL).
    With PACKED, bounds is that of `bounds_kernel`, final states come from `sub_split_states_kernel`, and what a sequence
    gets of its initial state in the chunk it begins in from `add_initial_kernel`.
    before [B, H, num_states, D, E] fp32, from scan_states_kernel: every states_per_split-th is the state before a split.
    States are [E, D] in memory if STATE_TRANSPOSED. With BD2, the columns of a and b beyond BD, chunks are those of
    `_chunk_wide`. b_decay [H, CHUNK] fp32: scratch, None without TMA.
    """
    COL_BLOCKS: tl.constexpr = tl.cdiv(E, BE)
    program = tl.program_id(0)
    first_of_dual = True
    if DUAL:
        first_of_dual = program % 2 == 0
        program = program // 2
    head = (program // COL_BLOCKS).to(tl.int64)
    first_col = program % COL_BLOCKS * BE
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    g = tl.load(log_decay_ptr + head) * LOG2E
    cols = E - first_col
    a_ptr += row * a_b + head * a_h
    b_ptr += row * b_b + head * b_h
    c_ptr += row * c_b + head * c_h
    o_ptr += row * o_b + head * o_h
    transposed = STATE_TRANSPOSED
    if DUAL:  # noqa: SIM102 (the outer test is made at compile time)
        if not first_of_dual:
            transposed = not STATE_TRANSPOSED
            a_ptr, a_t = a2_ptr + row * a2_b + head * a2_h, a2_t
            o_ptr, o_t = o2_ptr + row * o2_b + head * o2_h, o2_t
            b_ptr, b_t, c_ptr, c_t = c_ptr, c_t, b_ptr, b_t
    c_ptr += first_col
    o_ptr += first_col
    ptrs = (a_ptr, b_ptr, c_ptr, o_ptr)
    row_strides = (a_t, b_t, c_t, o_t)
    # Placeholders, so that the calls below have one form: without TMA neither is read.
    descriptors = ptrs
    b_decay = g
    if BD2:
        descriptors = (  # type: ignore[assignment]
            tl.make_tensor_descriptor(a_ptr, [T, D], [a_t, 1], [CHUNK, BD]),
            tl.make_tensor_descriptor(b_ptr, [T, D], [b_t, 1], [CHUNK, BD]),
            tl.make_tensor_descriptor(c_ptr, [T, cols], [c_t, 1], [CHUNK, BE]),
            tl.make_tensor_descriptor(o_ptr, [T, cols], [o_t, 1], [CHUNK, BE]),
            tl.make_tensor_descriptor(a_ptr, [T, D], [a_t, 1], [CHUNK, BD2]),
            tl.make_tensor_descriptor(b_ptr, [T, D], [b_t, 1], [CHUNK, BD2]),
        )
    elif TMA:
        descriptors = (
            tl.make_tensor_descriptor(a_ptr, [T, D], [a_t, 1], [CHUNK, BD]),
            tl.make_tensor_descriptor(b_ptr, [T, D], [b_t, 1], [CHUNK, BD]),
            tl.make_tensor_descriptor(c_ptr, [T, cols], [c_t, 1], [CHUNK, BE]),
            tl.make_tensor_descriptor(o_ptr, [T, cols], [o_t, 1], [CHUNK, BE]),
        )
        # Stored and loaded again, because Triton moves a left operand from shared memory straight into registers only if
        # everything it is computed from was loaded. All programs of a head store the same values.
        r = tl.arange(0, CHUNK)
        to_end = r + 1 if REVERSE else CHUNK - 1 - r
        tl.store(b_decay_ptr + head * CHUNK + r, tl.exp2(g * to_end.to(tl.float32)))
        tl.debug_barrier()
        if PACKED:
            b_decay = b_decay_ptr + head * CHUNK
        else:
            b_decay = tl.load(b_decay_ptr + head * CHUNK + r)

    begin = split * split_len
    end = tl.minimum(begin + split_len, T)
    # Of a wide state [D, BE] the tiles are transposed: [BE, BD] and [BE, BD2].
    if BD2:
        offsets, mask = _transposed_tile(first_col, 0, transposed, D, E, BD, BE)
        offsets2, mask2 = _transposed_tile(first_col, BD, transposed, D, E, BD2, BE)
        state = tl.zeros([BE, BD], tl.float32)
        state2 = tl.zeros([BE, BD2], tl.float32)
    else:
        offsets, mask = _state_tile(first_col, transposed, D, E, BD, BE)
        state = tl.zeros([BD, BE], tl.float32)
        offsets2, mask2, state2 = offsets, mask, g
    state_offset = (row * H + head) * (D * E)
    # A packed row's initial states are taken up where its sequences begin.
    FROM_STATE: tl.constexpr = HAS_BEFORE or (HAS_INITIAL and not PACKED)
    if FROM_STATE:
        if HAS_BEFORE:
            from_ptr = before_ptr + ((row * H + head) * num_states + split * states_per_split) * (D * E)
        else:
            from_ptr = initial_ptr + state_offset
        state = tl.load(from_ptr + offsets, mask=mask, other=0.0)
        if BD2:
            state2 = tl.load(from_ptr + offsets2, mask=mask2, other=0.0)
    initial = (initial_ptr, bounds_ptr, H, offsets, mask, offsets2, mask2)
    if PACKED and HAS_INITIAL:
        initial = (
            initial_ptr + head * (D * E), bounds_ptr + 2 * bounds_size, H * D * E, offsets, mask, offsets2, mask2,
        )  # fmt: skip
    state, state2 = _scan_chunks(
        ptrs, row_strides, descriptors, begin, end, T, state, state2, g, b_decay, cols, (bounds_ptr, bounds_size), initial,
        RAGGED, D, E, BD, BD2, BE, CHUNK, REVERSE, TMA, PRECISION, PACKED, HAS_INITIAL,
    )  # fmt: skip
    if STORE_FINAL:  # noqa: SIM102
        if end == T and first_of_dual:
            tl.store(final_ptr + state_offset + offsets, state, mask=mask)
            if BD2:
                tl.store(final_ptr + state_offset + offsets2, state2, mask=mask2)
