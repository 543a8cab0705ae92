"""Launch the Triton kernels: `triton_forward` and `triton_backward`, called by `op.py` on CUDA.

Arguments and results are those of the chunked CPU form (`chunk.py`), so tests run either on the same inputs.
Nothing here depends on the values of tensors, so nothing waits for the GPU, and nothing is tuned at run
time.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from tnllm.kernels.lightning_attention.kernels import attend_kernel, piece_states_kernel, scan_states_kernel


@dataclass(frozen=True)
class Device:
    num_sms: int
    shared_memory: int  # bytes one program may use
    has_tma: bool


@dataclass(frozen=True)
class Config:
    """How a kernel is built: tokens per chunk, columns of c per program, warps and pipeline stages."""

    chunk: int
    cols: int
    num_warps: int
    num_stages: int
    tma: bool = False


@dataclass(frozen=True)
class Plan:
    """How T tokens are cut: one program walks `segment` tokens; states are computed by `piece`."""

    segment: int
    piece: int


@cache
def _cuda_device(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    capability = torch.cuda.get_device_capability(index)
    return Device(properties["multiprocessor_count"], properties["max_shared_mem"], capability >= (9, 0))


def _device(x: Tensor) -> Device:
    # Tensors on CPU are tests under Triton's interpreter.
    return _cuda_device(x.get_device()) if x.is_cuda else Device(4, 232448, True)


@cache
def attend_config(a_dim: int, itemsize: int, device: Device, dual: bool = False) -> Config:
    """One program of 4 warps and 64 columns per multiprocessor, with as deep a pipeline as shared memory
    holds.

    On an H100 (B 16, H 16, T 4096, D = E = 128, bf16) 4 stages took 0.379 ms, 3 stages 0.403, 2 stages (two
    programs per multiprocessor) 0.436; 8 warps with all 128 columns 0.458 at best. Loads by TMA descriptor
    made `dual` 10 % faster (0.660 against 0.731 ms: it saves the registers of the addresses) and the others
    2 % slower.
    """
    chunk = 64 if itemsize == 2 else 32
    rows = triton.next_power_of_2(a_dim)
    if rows == 256 and itemsize == 4 and device.shared_memory < 131072:
        raise ValueError(
            f"float32 with head dims above 128 needs 128 KiB of shared memory, this GPU has "
            f"{device.shared_memory // 1024}; use bfloat16"
        )
    # 64 also where c has 32 columns (the rest is masked): with 32 the packed kernel, as Triton 3.6 builds it
    # for bf16, reached outside its shared memory.
    cols = 64
    tile_bytes = (2 * chunk * rows + chunk * cols) * itemsize
    scratch_bytes = (rows + chunk) * cols * itemsize
    num_stages = max(1, min(4, (device.shared_memory - scratch_bytes) // tile_bytes))
    # Wider than 128 the state takes the registers of 8 warps.
    return Config(chunk, cols, 4 if rows <= 128 else 8, num_stages, dual and device.has_tma and rows <= 128)


@cache
def plan(T: int, num_programs: int, num_sms: int, chunk: int) -> Plan:
    """Cut T tokens so that `num_programs` programs per segment fill the GPU in few, full waves.

    A segment costs its tokens and, where there are several, about 512 more for its state (read, written,
    joined). Pieces are smaller, for four programs per multiprocessor: their kernel is short, and its time is
    that of one walk.
    """

    def cost(segments: int) -> float:
        waves = -(-num_programs * segments // num_sms)
        return waves * (T / segments + (512 if segments > 1 else 0))

    most = max(1, min(T // (8 * chunk), 4 * num_sms // num_programs))
    segments = min(range(1, most + 1), key=cost)
    if segments == 1:
        return Plan(T, T)
    length = -(-T // segments)
    pieces = max(1, min(4 * num_sms // (num_programs * segments), length // (8 * chunk)))
    piece = -(-length // (pieces * chunk)) * chunk
    return Plan(pieces * piece, piece)


@dataclass(frozen=True)
class _Walk:
    """One direction of time over one batch."""

    log_decay: Tensor
    cu_seqlens: Tensor | None
    num_seqs: int
    T: int
    reverse: bool

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def new_final(self, initial: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        # Packed sequences may be empty, and then no program writes their state: it stays the initial one.
        if not self.packed:
            return torch.empty(shape, device=like.device, dtype=torch.float32)
        if initial is None:
            return torch.zeros(shape, device=like.device, dtype=torch.float32)
        return initial.clone()


def _precision(x: Tensor) -> str:
    # float32 operands as three tf32 products: error near 1e-6 on tensor cores (one tf32 product leaves 3e-4).
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _states_before(
    walk: _Walk, cut: Plan, b: Tensor, c: Tensor, initial: Tensor | None, transposed: bool
) -> Tensor | None:
    """The state before each piece [B, H, pieces, D * E], or None where one segment is all."""
    if cut.segment >= walk.T:
        return None
    return _states(walk, cut.piece, triton.cdiv(walk.T, cut.piece) - 1, 0, b, c, initial, transposed)


def _states(
    walk: _Walk,
    piece: int,
    num_pieces: int,
    offset: int,
    b: Tensor,
    c: Tensor,
    initial: Tensor | None,
    transposed: bool,
) -> Tensor:
    """The state before each of `num_pieces` pieces, and after the last [B, H, num_pieces + 1, D * E]."""
    B, _, H, A = b.shape
    N = c.shape[-1]
    config = attend_config(A, b.element_size(), _device(b))
    states = torch.empty(B, H, num_pieces + 1, A * N, device=b.device, dtype=torch.float32)
    carries = torch.empty(num_pieces + 1, device=b.device, dtype=torch.int32) if walk.packed else None
    piece_states_kernel[(H * triton.cdiv(N, config.cols), num_pieces, B)](
        b,
        c,
        walk.log_decay,
        initial,
        states,
        carries,
        walk.cu_seqlens,
        *b.stride()[:3],
        *c.stride()[:3],
        walk.T,
        H,
        piece,
        offset,
        walk.num_seqs,
        A=A,
        N=N,
        BA=triton.next_power_of_2(A),
        BC=config.cols,
        CHUNK=config.chunk,
        REVERSE=walk.reverse,
        STATE_TRANSPOSED=transposed,
        HAS_INITIAL=initial is not None,
        PACKED=walk.packed,
        RAGGED=walk.packed or offset > 0,
        PRECISION=_precision(b),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    scan_states_kernel[(A * N // 128, B * H)](
        states,
        walk.log_decay,
        initial,
        carries,
        H,
        piece,
        num_pieces + 1,
        SIZE=A * N,
        BLOCK=128,
        GROUP=8,
        HAS_INITIAL=initial is not None,
        PACKED=walk.packed,
        num_warps=4,
    )
    return states


def _attend(
    walk: _Walk,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    transposed: bool,
    second: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out = attend(a, b, c), and with `second` = (a2, out2) also out2 = attend(a2, c, b)."""
    B, T, H, A = a.shape
    N = c.shape[-1]
    a2, out2 = second or (a, out)
    device = _device(a)
    config = attend_config(A, a.element_size(), device, dual=second is not None)
    if config.tma:
        # Triton writes descriptors to memory that it asks for here.
        triton.set_allocator(lambda size, align, stream: torch.empty(size, device=a.device, dtype=torch.int8))
    b_decay = torch.empty(H, config.chunk, device=a.device, dtype=torch.float32) if config.tma else None
    programs = H * triton.cdiv(N, config.cols) * (2 if second else 1)
    cut = plan(T, B * programs, device.num_sms, config.chunk)
    before = _states_before(walk, cut, b, c, initial, transposed)
    attend_kernel[(programs, triton.cdiv(T, cut.segment), B)](
        a,
        b,
        c,
        out,
        a2,
        out2,
        walk.log_decay,
        b_decay,
        initial,
        before,
        final,
        walk.cu_seqlens,
        *a.stride()[:3],
        *b.stride()[:3],
        *c.stride()[:3],
        *out.stride()[:3],
        *a2.stride()[:3],
        *out2.stride()[:3],
        T,
        H,
        cut.segment,
        cut.segment // cut.piece,
        triton.cdiv(T, cut.piece),
        walk.num_seqs,
        A=A,
        N=N,
        BA=triton.next_power_of_2(A),
        BC=config.cols,
        CHUNK=config.chunk,
        REVERSE=walk.reverse,
        DUAL=second is not None,
        STATE_TRANSPOSED=transposed,
        HAS_INITIAL=initial is not None,
        HAS_BEFORE=before is not None,
        STORE_FINAL=final is not None,
        PACKED=walk.packed,
        RAGGED=walk.packed or T % config.chunk != 0,
        TMA=config.tma,
        PRECISION=_precision(a),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _readable(x: Tensor) -> Tensor:
    """x itself where rows are contiguous and start at 16 bytes, as slices of a projection do; else a copy."""
    step = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s % step == 0 for s in x.stride()[:3])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _walks(q: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None) -> tuple[_Walk, _Walk]:
    num_seqs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    log_decay, cu_seqlens = log_decay.contiguous(), _optional(cu_seqlens)
    shared = (log_decay, cu_seqlens, num_seqs, q.shape[1])
    return _Walk(*shared, reverse=False), _Walk(*shared, reverse=True)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, device=x.device, dtype=x.dtype)


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, E] and the final state, or None for it where it is not needed."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    walk, _ = _walks(q, log_decay, cu_seqlens)
    initial, o = _optional(initial_state), _like(v)
    shape = (walk.num_seqs, *q.shape[2:], v.shape[-1])
    final = walk.new_final(initial, q, shape) if need_state else None
    _attend(walk, q, k, v, o, initial, final, transposed=False)
    return o, final


def triton_state(b: Tensor, c: Tensor, log_decay: Tensor, reverse: bool = False) -> Tensor:
    """What the tokens of a row leave in a state that was zero before them, fp32 [B, H, D, E], from b and c alone.

    The sum over t of decay^(T - 1 - t) b_t c_t^T; in reverse that of decay^(t + 1) b_t c_t^T.
    """
    b, c = _readable(b), _readable(c)
    B, T, H, A = b.shape
    N, device = c.shape[-1], _device(b)
    walk = _Walk(log_decay.contiguous(), None, B, T, reverse)
    config = attend_config(A, b.element_size(), device)
    programs = B * H * triton.cdiv(N, config.cols)
    most = max(1, min(4 * device.num_sms // programs, T // (8 * config.chunk)))
    piece = triton.cdiv(triton.cdiv(T, most), config.chunk) * config.chunk
    num_pieces = triton.cdiv(T, piece)
    states = _states(walk, piece, num_pieces, num_pieces * piece - T, b, c, None, False)
    return states[:, :, -1].unflatten(-1, (A, N))


def triton_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv (written to `into` where given) and, where there was an initial state, its gradient."""
    do, q, k, v = _readable(do), _readable(q), _readable(k), _readable(v)
    forward, backward = _walks(q, log_decay, cu_seqlens)
    initial, dfinal = _optional(initial_state), _optional(dfinal)
    dq, dk, dv = into or (_like(q), _like(k), _like(v))
    dinitial = None if initial is None else backward.new_final(dfinal, q, tuple(initial.shape))
    _attend(forward, do, v, k, dq, initial, None, transposed=True)
    if q.shape[-1] == v.shape[-1]:
        _attend(backward, v, do, q, dk, dfinal, dinitial, transposed=True, second=(k, dv))
    else:
        _attend(backward, v, do, q, dk, dfinal, dinitial, transposed=True)
        _attend(backward, k, q, do, dv, dfinal, None, transposed=False)
    return dq, dk, dv, dinitial
