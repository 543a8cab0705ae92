"""States between the splits of a row, and where the sequences of a packed row lie: the kernels around `attend_kernel`.

Each split of a row needs the state before it: `sub_split_states_kernel` computes what each sub-split (a fraction of a
split, for more parallelism) adds to the state, and `scan_states_kernel` turns that into the state before each sub-split.
For the names of operands and for time reversed see `kernels.py`.
"""

import triton
import triton.language as tl

from tnllm.kernels.lightning_attention.kernels import LOG2E, _load_tile, _state_tile, _store_tile

# Terms that have decayed by this power of two are left out of a state. fp32 rounds a sum of recent terms at 2^-24, which is
# enough for 16-bit inputs: their own rounding is 2^-9.
NEGLIGIBLE_LOG2_16_BIT = tl.constexpr(24.0)
NEGLIGIBLE_LOG2_32_BIT = tl.constexpr(32.0)


@triton.jit
def _bisect(cu_ptr, t, low, high):
    """One step towards the last sequence that begins at or before t, so never an empty one."""
    middle = (low + high) // 2
    started = tl.load(cu_ptr + middle) <= t
    return tl.where(started, middle, low), tl.where(started, high, middle)


@triton.jit(do_not_specialize=["T", "num_seqs", "steps"])
def bounds_kernel(cu_ptr, bounds_ptr, T, num_seqs, steps, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Grid (T / BLOCK): where sequences begin and end, for each token and each chunk.

    bounds int32, with N = T rounded up to BLOCK: of each token its sequence's first token, the first one after it, and its
    index [3, N]; then `lead` and `tail` of each chunk, forward and with time reversed [2, N / CHUNK, 2]. In rows counted in
    time, those below `lead` continue the sequence before the chunk; its last sequence has those from `tail` on, which is
    negative if it began before the chunk. `steps` of bisection: at least log2(num_seqs).
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    CHUNKS: tl.constexpr = BLOCK // CHUNK
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)[None, :]
    # Forward: a chunk's first token and its last; with time reversed likewise.
    side = tl.arange(0, 4)[:, None]
    backward = side >= 2
    begin = tl.where(backward, T - (chunk + 1) * CHUNK, chunk * CHUNK)
    stop = tl.minimum(begin + CHUNK, T)
    begin = tl.maximum(begin, 0)
    edge = tl.where(side % 2 == 0, begin, stop - 1)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_seqs
    edge_low = tl.zeros([4, CHUNKS], tl.int32)
    edge_high = edge_low + num_seqs
    for _ in range(steps):
        low, high = _bisect(cu_ptr, t, low, high)
        edge_low, edge_high = _bisect(cu_ptr, edge, edge_low, edge_high)
    size = tl.num_programs(0) * BLOCK
    tl.store(bounds_ptr + t, tl.load(cu_ptr + low))
    tl.store(bounds_ptr + size + t, tl.load(cu_ptr + low + 1))
    tl.store(bounds_ptr + 2 * size + t, low)
    first = tl.load(cu_ptr + edge_low)
    after = tl.load(cu_ptr + edge_low + 1)
    begun = tl.where(backward, after > stop, first < begin)
    lead = tl.where(begun, tl.where(backward, stop - first, after - begin), 0)
    tail = tl.where(backward, stop - after, first - begin)
    ptrs = bounds_ptr + 3 * size + (backward * (size // CHUNK) + chunk) * 2
    oldest = (side == 0) | (side == 3)
    tl.store(ptrs, lead, mask=oldest)
    tl.store(ptrs + 1, tail, mask=(side == 1) | (side == 2))


@triton.jit
def _sequence(cu_ptr, n, T, REVERSE: tl.constexpr):
    """First token in time of sequence n, and the first one after it."""
    start = tl.load(cu_ptr + n)
    end = tl.load(cu_ptr + n + 1)
    if REVERSE:
        return T - end, T - start
    else:
        return start, end


@triton.jit(do_not_specialize=["T", "H"])
def add_initial_kernel(
    a_ptr, o_ptr, log_decay_ptr, initial_ptr, cu_ptr,
    a_t, a_h, o_t, o_h,
    T, H,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, STATE_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (sequences x heads x column blocks): add to o what a sequence gets of its initial state in its first chunk.

    `attend_kernel` cuts a row in chunks wherever sequences begin: several may begin in one chunk, which carries one state.
    """
    COL_BLOCKS: tl.constexpr = tl.cdiv(E, BE)
    index = tl.program_id(0) // COL_BLOCKS
    first_col = tl.program_id(0) % COL_BLOCKS * BE
    head = (index % H).to(tl.int64)
    n = index // H
    g = tl.load(log_decay_ptr + head) * LOG2E
    start, end = _sequence(cu_ptr, n, T, REVERSE)
    stop = tl.minimum(end, start // CHUNK * CHUNK + CHUNK)
    rows = stop - start
    token = T - stop if REVERSE else start
    r = tl.arange(0, CHUNK)
    if REVERSE:
        r = rows - 1 - r
    from_start = tl.exp2(g * tl.maximum(r + 1 - REVERSE, 0).to(tl.float32))
    cols = E - first_col
    a = _load_tile(a_ptr + head * a_h, a_t, token, rows, D, True, True, CHUNK, BD)
    o_ptr += head * o_h + first_col
    out = _load_tile(o_ptr, o_t, token, rows, cols, True, True, CHUNK, BE).to(tl.float32)
    offsets, mask = _state_tile(first_col, STATE_TRANSPOSED, D, E, BD, BE)
    state = tl.load(initial_ptr + index.to(tl.int64) * (D * E) + offsets, mask=mask, other=0.0).to(a.dtype)
    out += tl.dot(a, state, input_precision=PRECISION) * from_start[:, None]
    _store_tile(o_ptr, out, o_t, token, rows, cols, True, True, CHUNK, BE)


@triton.jit(do_not_specialize=["T", "H", "sub_split", "offset", "num_states", "bounds_size"])
def sub_split_states_kernel(
    b_ptr, c_ptr, log_decay_ptr, initial_ptr, before_ptr, out_ptr, carries_ptr, bounds_ptr, cu_ptr,
    b_b, b_t, b_h, c_b, c_t, c_h,
    T, H, sub_split, offset, num_states, bounds_size,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, STATE_TRANSPOSED: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    FINAL: tl.constexpr, HAS_BEFORE: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (heads x column blocks, sub-splits, batch): what each sub-split adds to the state.

    The first sub-split is `offset` tokens shorter (needs RAGGED if not 0). out [B, H, sub-splits + 1, D, E]: index i + 1
    gets the state after sub-split i from a zero state before it. carries [sub-splits + 1]: 1 if the sequence at the
    sub-split's end began before the sub-split, else 0.

    With FINAL (needs PACKED) the grid is (sequences x heads x column blocks, 1, 1), and out [num_seqs, H, D, E] gets the
    state after each sequence. before [H, num_states, D, E] is that of `attend_kernel` (None without HAS_BEFORE).
    """
    COL_BLOCKS: tl.constexpr = tl.cdiv(E, BE)
    first_col = tl.program_id(0) % COL_BLOCKS * BE
    head = (tl.program_id(0) // COL_BLOCKS).to(tl.int64)
    index = tl.program_id(1)
    if FINAL:
        index = (head // H).to(tl.int32)
        head = head % H
    row = tl.program_id(2).to(tl.int64)
    g = tl.load(log_decay_ptr + head) * LOG2E
    end = index * sub_split + sub_split - offset
    begin = tl.maximum(end - sub_split, 0)
    starts_inside = False
    start = begin
    sequence = index
    if FINAL:
        start, end = _sequence(cu_ptr, index, T, REVERSE)
        begin = tl.maximum(end - 1, 0) // sub_split * sub_split
        starts_inside = start >= begin
    elif PACKED:
        last = T - end if REVERSE else end - 1
        start = T - tl.load(bounds_ptr + bounds_size + last) if REVERSE else tl.load(bounds_ptr + last)
        sequence = tl.load(bounds_ptr + 2 * bounds_size + last)
        starts_inside = start >= begin
        tl.store(carries_ptr + index, tl.where(starts_inside, 0, 1))
    # Skip tokens whose contribution is negligible at the end of the sub-split; a multiple of CHUNK tokens, at least one
    # chunk, remains.
    NEGLIGIBLE: tl.constexpr = (
        NEGLIGIBLE_LOG2_32_BIT if b_ptr.dtype.element_ty == tl.float32 else NEGLIGIBLE_LOG2_16_BIT
    )
    # As a tensor: Triton 3.7's interpreter cannot divide a constexpr by one.
    negligible = tl.full((), NEGLIGIBLE, tl.float32)
    window = tl.minimum(negligible / tl.maximum(-g, 1e-9), sub_split * 1.0).to(tl.int32)
    window = tl.cdiv(window + 1, CHUNK) * CHUNK
    first = tl.maximum(tl.maximum(begin, start), end - window)

    b_ptr += row * b_b + head * b_h
    c_ptr += row * c_b + head * c_h + first_col
    cols = E - first_col
    r = tl.arange(0, CHUNK)
    state = tl.zeros([BD, BE], tl.float32)
    rows = 0
    if RAGGED:
        rows = (end - first) % CHUNK
        if rows > 0:
            token = T - first - rows if REVERSE else first
            b = _load_tile(b_ptr, b_t, token, rows, D, True, True, CHUNK, BD)
            c = _load_tile(c_ptr, c_t, token, rows, cols, True, True, CHUNK, BE)
            to_end = r + 1 if REVERSE else tl.maximum(rows - 1 - r, 0)
            decayed = (c.to(tl.float32) * tl.exp2(g * to_end.to(tl.float32))[:, None]).to(c.dtype)
            state = tl.dot(tl.trans(b), decayed, input_precision=PRECISION)
    to_end = tl.exp2(g * (r + 1 if REVERSE else CHUNK - 1 - r).to(tl.float32))
    over_chunk = tl.exp2(g * CHUNK)
    for i in range((end - first) // CHUNK):
        token = first + rows + i * CHUNK
        if REVERSE:
            token = T - CHUNK - token
        b = _load_tile(b_ptr, b_t, token, CHUNK, D, False, BD != D, CHUNK, BD)
        c = _load_tile(c_ptr, c_t, token, CHUNK, cols, False, E % BE != 0, CHUNK, BE)
        decayed = (c.to(tl.float32) * to_end[:, None]).to(c.dtype)
        state = tl.dot(tl.trans(b), decayed, state * over_chunk, input_precision=PRECISION)
    offsets, mask = _state_tile(first_col, STATE_TRANSPOSED, D, E, BD, BE)
    if PACKED and HAS_INITIAL:  # noqa: SIM102
        if starts_inside:
            initial_ptr += (sequence.to(tl.int64) * H + head) * (D * E)
            state += tl.load(initial_ptr + offsets, mask=mask, other=0.0) * tl.exp2(g * (end - start).to(tl.float32))
    if HAS_BEFORE:  # noqa: SIM102
        if start < begin:
            before_ptr += (head * num_states + begin // sub_split) * (D * E)
            state += tl.load(before_ptr + offsets, mask=mask, other=0.0) * tl.exp2(g * (end - begin).to(tl.float32))
    out_index = (row * H + head) * (tl.num_programs(1) + 1) + index + 1
    if FINAL:
        out_index = index.to(tl.int64) * H + head
    tl.store(out_ptr + out_index * (D * E) + offsets, state, mask=mask)


@triton.jit(do_not_specialize=["H", "sub_split", "num_states"])
def scan_states_kernel(
    states_ptr, log_decay_ptr, initial_ptr, carries_ptr,
    H, sub_split, num_states,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (SIZE / BLOCK, B * H): turn what each sub-split adds into the state before each sub-split, in place.

    states [B * H, num_states, SIZE] with SIZE = D * E; index 0 becomes the initial state, or zero. GROUP states are
    loaded at a time: one by one, each load would wait for the previous one.
    """
    head_row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g_sub_split = tl.load(log_decay_ptr + head_row % H) * LOG2E * sub_split
    states_ptr += head_row * num_states * SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL and not PACKED:
        state = tl.load(initial_ptr + head_row * SIZE + i)
    tl.store(states_ptr + i, state)
    j = tl.arange(0, GROUP)
    gap = j[:, None] - j[None, :]
    for first in range(1, num_states, GROUP):
        index = first + j
        valid = index < num_states
        ptrs = states_ptr + index[:, None] * SIZE + i[None, :]
        added = tl.load(ptrs, mask=valid[:, None], other=0.0)
        weight = tl.where(gap >= 0, tl.exp2(g_sub_split * tl.maximum(gap, 0).to(tl.float32)), 0.0)
        weight_before = tl.exp2(g_sub_split * (j + 1).to(tl.float32))
        if PACKED:
            resets = tl.cumsum(1 - tl.load(carries_ptr + index - 1, mask=valid, other=1), 0)
            weight = tl.where(resets[:, None] == resets[None, :], weight, 0.0)
            weight_before = tl.where(resets == 0, weight_before, 0.0)
        states = tl.sum(weight[:, :, None] * added[None, :, :], 1) + weight_before[:, None] * state[None, :]
        tl.store(ptrs, states, mask=valid[:, None])
        state = tl.sum(tl.where(index[:, None] == first + GROUP - 1, states, 0.0), 0)
