"""Launch the Triton kernels: `triton_forward` and `triton_backward`, called by `op.py` on CUDA.

Arguments and results are those of the chunked CPU form (`chunk.py`), so tests run either on the same inputs. No decision
depends on the values of tensors, so the host never synchronises with the GPU; nothing is autotuned at run time.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from tnllm.kernels.lightning_attention.kernels import attend_kernel
from tnllm.kernels.lightning_attention.states import (
    add_initial_kernel,
    bounds_kernel,
    scan_states_kernel,
    sub_split_states_kernel,
)


@dataclass(frozen=True)
class Device:
    num_sms: int
    shared_memory: int  # bytes one program may use
    has_tma: bool


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options: tokens per chunk, columns of c per program, warps, pipeline stages, use of TMA."""

    chunk: int
    cols: int
    num_warps: int
    num_stages: int
    tma: bool = False
    wide: bool = False  # `_chunk_wide`: the state is two transposed tiles in registers


@dataclass(frozen=True)
class Plan:
    """How T tokens are split: a program scans `split` tokens; states are computed every `sub_split` tokens."""

    split: int
    sub_split: int


@cache
def cuda_device(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    capability = torch.cuda.get_device_capability(index)
    return Device(properties["multiprocessor_count"], properties["max_shared_mem"], capability >= (9, 0))


def _device(x: Tensor) -> Device:
    # Tensors are on CPU in tests under Triton's interpreter.
    return cuda_device(x.get_device()) if x.is_cuda else Device(4, 232448, True)


@cache
def state_config(head_dim: int, itemsize: int, device: Device) -> Config:
    """64 columns a program, with as many pipeline stages as shared memory holds. `head_dim` is the width of b."""
    chunk = 64 if itemsize == 2 else 32
    rows = triton.next_power_of_2(head_dim)
    if rows == 256 and itemsize == 4 and device.shared_memory < 131072:
        raise ValueError(
            f"float32 with head dims above 128 needs 128 KiB of shared memory, this GPU has "
            f"{device.shared_memory // 1024}; use bfloat16"
        )
    # 64 even if c has 32 columns (the rest is masked): with 32, Triton 3.6 compiled the packed bf16 kernel to accesses
    # outside its shared memory.
    cols = 64
    tile_bytes = (2 * chunk * rows + chunk * cols) * itemsize
    scratch_bytes = (rows + chunk) * cols * itemsize
    num_stages = max(1, min(4, (device.shared_memory - scratch_bytes) // tile_bytes))
    # Above 128 rows the state needs the registers of 8 warps.
    return Config(chunk, cols, 4 if rows <= 128 else 8, num_stages)


@cache
def attend_config(head_dim: int, cols: int, itemsize: int, device: Device, chunks: int, dual: bool = False) -> Config:
    """One program per SM, or two where rows are so short that one cannot hide the latency of its loads.

    `head_dim` is the width of a and b, `cols` that of c, `chunks` how many of 64 tokens a program scans, up to 16.
    Measured on an H100 in bf16, milliseconds (B H T D; the best in brackets):

        16 16 4096 128   4 stages [0.379], 3: 0.403, 2, two programs per SM: 0.436; 8 warps, 128 columns: 0.458 at best
        2048 2 64 128    2 stages [0.126], 1: 0.184, 3: 0.176, 4: 0.176; dk and dv with 2: [0.25], by TMA at best 0.42
        2 16 30011 96    by TMA [0.37], else 0.57: masks cost more than what TMA pads with zeros
        2 8 16384 256    wide, 4 warps, 64 columns [0.37]; wide, 8 warps, 128 columns: 0.44; not wide: 0.71 at best
        4 16 8192 192    wide, 8 warps, 128 columns [0.40]; wide, 4 warps, 64 columns: 0.51; not wide: 1.04 at best

    Loads by TMA descriptor made `dual` at 128 columns 10 % faster (0.660 against 0.731 ms: fewer address registers) from
    16 chunks on, and the other launches 2 % slower.
    """
    config = state_config(head_dim, itemsize, device)
    if itemsize == 4:
        return replace(config, tma=dual and device.has_tma and head_dim <= 128)
    if head_dim > 128 and device.has_tma and device.shared_memory >= 232448:
        # dq, dk and dv of 4 16 8192 192: 1.35 ms with 128 columns for dk and dv, 1.23 with 64.
        more = head_dim <= 192 and cols > 64 and not dual
        return Config(config.chunk, 128 if more else 64, 8 if more else 4, 3, tma=True, wide=True)
    padded = head_dim & (head_dim - 1) != 0
    tma = device.has_tma and chunks >= 16 and (padded or (dual and head_dim > 64)) and head_dim <= 128
    stages = 2 if chunks <= 2 else 3 if head_dim <= 64 or (dual and not tma) else 4
    return replace(config, num_stages=min(stages, config.num_stages), tma=tma)


@cache
def plan(T: int, num_programs: int, num_sms: int, chunk: int) -> Plan:
    """Split T tokens so that `num_programs` programs per split fill the GPU in few, full waves.

    A split costs its tokens and, if there are several, about 512 more for its state (written, scanned, read). Sub-splits
    are smaller, for four programs per SM: their kernel is short and takes as long as one program does.
    """

    def cost(splits: int) -> float:
        waves = -(-num_programs * splits // num_sms)
        return waves * (T / splits + (512 if splits > 1 else 0))

    max_splits = max(1, min(T // (8 * chunk), 4 * num_sms // num_programs))
    splits = min(range(1, max_splits + 1), key=cost)
    if splits == 1:
        return Plan(T, T)
    length = -(-T // splits)
    sub_splits = max(1, min(4 * num_sms // (num_programs * splits), length // (8 * chunk)))
    sub_split = -(-length // (sub_splits * chunk)) * chunk
    return Plan(sub_splits * sub_split, sub_split)


@dataclass(frozen=True)
class _Scan:
    """A scan of one batch, forward or reversed in time."""

    log_decay: Tensor
    cu_seqlens: Tensor | None
    bounds: Tensor | None  # of bounds_kernel; None: not packed
    T: int
    reverse: bool

    @property
    def packed(self) -> bool:
        return self.bounds is not None

    @property
    def bounds_size(self) -> int:
        """Entries of `bounds` for each of the three things it knows of a token."""
        return triton.cdiv(self.T, _BOUNDS_BLOCK) * _BOUNDS_BLOCK


_BOUNDS_BLOCK = 1024


def _bounds(cu_seqlens: Tensor, T: int, chunk: int) -> Tensor:
    blocks, num_seqs = triton.cdiv(T, _BOUNDS_BLOCK), cu_seqlens.shape[0] - 1
    size = blocks * _BOUNDS_BLOCK
    bounds = torch.empty(3 * size + 4 * size // chunk + 2, device=cu_seqlens.device, dtype=torch.int32)
    bounds_kernel[(blocks,)](
        cu_seqlens, bounds, T, num_seqs, num_seqs.bit_length(), BLOCK=_BOUNDS_BLOCK, CHUNK=chunk, num_warps=8
    )
    return bounds


def _precision(x: Tensor) -> str:
    # float32 operands as three tf32 products: error near 1e-6 on tensor cores (one tf32 product leaves 3e-4).
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _states_before(
    scan: _Scan, splits: Plan, b: Tensor, c: Tensor, initial: Tensor | None, transposed: bool
) -> Tensor | None:
    """The state before each sub-split [B, H, sub-splits, D * E]; None if there is one split only."""
    if splits.split >= scan.T:
        return None
    num_before_last = triton.cdiv(scan.T, splits.sub_split) - 1
    return _states(scan, splits.sub_split, num_before_last, 0, b, c, initial, transposed)


def _sub_split_states(
    scan: _Scan, grid: tuple[int, int, int], sub_split: int, offset: int, b: Tensor, c: Tensor, out: Tensor,
    carries: Tensor | None, initial: Tensor | None, before: Tensor | None, transposed: bool, final: bool = False,
) -> None:  # fmt: skip
    """Grid (heads or sequences x heads, sub-splits, batch), without the column blocks."""
    H, D = b.shape[2:]
    E = c.shape[-1]
    config = state_config(D, b.element_size(), _device(b))
    sub_split_states_kernel[(grid[0] * triton.cdiv(E, config.cols), *grid[1:])](
        b, c, scan.log_decay, initial, before, out, carries, scan.bounds, scan.cu_seqlens,
        *b.stride()[:3], *c.stride()[:3],
        scan.T, H, sub_split, offset, 0 if before is None else before.shape[2], scan.bounds_size,
        D=D, E=E, BD=triton.next_power_of_2(D), BE=config.cols, CHUNK=config.chunk,
        REVERSE=scan.reverse, STATE_TRANSPOSED=transposed, HAS_INITIAL=initial is not None,
        PACKED=scan.packed, FINAL=final, HAS_BEFORE=before is not None, RAGGED=scan.packed or offset > 0,
        PRECISION=_precision(b), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _states(
    scan: _Scan, sub_split: int, num_sub_splits: int, offset: int, b: Tensor, c: Tensor, initial: Tensor | None,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """The state before each of `num_sub_splits` sub-splits, and after the last [B, H, num_sub_splits + 1, D * E]."""
    B, _, H, D = b.shape
    E = c.shape[-1]
    states = torch.empty(B, H, num_sub_splits + 1, D * E, device=b.device, dtype=torch.float32)
    carries = torch.empty(num_sub_splits + 1, device=b.device, dtype=torch.int32) if scan.packed else None
    grid = (H, num_sub_splits, B)
    _sub_split_states(scan, grid, sub_split, offset, b, c, states, carries, initial, None, transposed)
    scan_states_kernel[(D * E // 128, B * H)](
        states, scan.log_decay, initial, carries, H, sub_split, num_sub_splits + 1,
        SIZE=D * E, BLOCK=128, GROUP=8, HAS_INITIAL=initial is not None, PACKED=scan.packed, num_warps=4,
    )  # fmt: skip
    return states


def _attend(
    scan: _Scan, a: Tensor, b: Tensor, c: Tensor, out: Tensor, initial: Tensor | None, final: Tensor | None,
    transposed: bool, second: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """out = attend(a, b, c), and with `second` = (a2, out2) also out2 = attend(a2, c, b)."""
    B, T, H, D = a.shape
    E = c.shape[-1]
    a2, out2 = second or (a, out)
    device = _device(a)
    config = attend_config(D, E, a.element_size(), device, min(triton.cdiv(T, 64), 16), dual=second is not None)
    if config.wide and scan.packed and initial is not None:
        # The states that a chunk takes up pass through shared memory.
        config = replace(config, num_stages=2)
    if config.tma:
        # Triton allocates memory for descriptors with this function.
        triton.set_allocator(lambda size, align, stream: torch.empty(size, device=a.device, dtype=torch.int8))
    b_decay = (
        torch.empty(H, config.chunk, device=a.device, dtype=torch.float32) if config.tma and not config.wide else None
    )
    programs = H * triton.cdiv(E, config.cols) * (2 if second else 1)
    splits = plan(T, B * programs, device.num_sms, config.chunk)
    before = _states_before(scan, splits, b, c, initial, transposed)
    attend_kernel[(programs, triton.cdiv(T, splits.split), B)](
        a, b, c, out, a2, out2, scan.log_decay, b_decay, initial, before,
        None if scan.packed else final, scan.bounds,
        *a.stride()[:3], *b.stride()[:3], *c.stride()[:3],
        *out.stride()[:3], *a2.stride()[:3], *out2.stride()[:3],
        T, H, splits.split, splits.split // splits.sub_split, triton.cdiv(T, splits.sub_split), scan.bounds_size,
        D=D, E=E, BD=128 if config.wide else triton.next_power_of_2(D),
        BD2=triton.next_power_of_2(D - 128) if config.wide else 0, BE=config.cols, CHUNK=config.chunk,
        REVERSE=scan.reverse, DUAL=second is not None, STATE_TRANSPOSED=transposed,
        HAS_INITIAL=initial is not None, HAS_BEFORE=before is not None, STORE_FINAL=final is not None and not scan.packed,
        PACKED=scan.packed, RAGGED=T % config.chunk != 0,
        TMA=config.tma, PRECISION=_precision(a),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if scan.packed and final is not None:
        grid = (final.shape[0] * H, 1, 1)
        _sub_split_states(scan, grid, splits.sub_split, 0, b, c, final, None, initial, before, transposed, final=True)
    if scan.packed and initial is not None:
        _add_initial(scan, a, out, initial, transposed)
        if second:
            _add_initial(scan, a2, out2, initial, not transposed)


def _add_initial(scan: _Scan, a: Tensor, out: Tensor, initial: Tensor, transposed: bool) -> None:
    H, D = a.shape[2:]
    E = out.shape[-1]
    config = state_config(D, a.element_size(), _device(a))
    add_initial_kernel[(initial.shape[0] * H * triton.cdiv(E, config.cols),)](
        a, out, scan.log_decay, initial, scan.cu_seqlens, *a.stride()[1:3], *out.stride()[1:3], scan.T, H,
        D=D, E=E, BD=triton.next_power_of_2(D), BE=config.cols, CHUNK=config.chunk, REVERSE=scan.reverse,
        STATE_TRANSPOSED=transposed, PRECISION=_precision(a), num_warps=config.num_warps,
    )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous and 16-byte aligned, as slices of a projection are; else a copy."""
    step = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and all(s % step == 0 for s in x.stride()[:3])
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _scans(q: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None) -> tuple[_Scan, _Scan]:
    log_decay, cu_seqlens, T = log_decay.contiguous(), _optional(cu_seqlens), q.shape[1]
    chunk = state_config(q.shape[-1], q.element_size(), _device(q)).chunk
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, T, chunk)
    return _Scan(log_decay, cu_seqlens, bounds, T, False), _Scan(log_decay, cu_seqlens, bounds, T, True)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, device=x.device, dtype=x.dtype)


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """o [B, T, H, E] and the final state (None without `need_state`)."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    scan, _ = _scans(q, log_decay, cu_seqlens)
    initial, o = _optional(initial_state), _like(v)
    final = None
    if need_state:
        num_seqs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final = torch.empty(num_seqs, *q.shape[2:], v.shape[-1], device=q.device, dtype=torch.float32)
    _attend(scan, q, k, v, o, initial, final, transposed=False)
    return o, final


def triton_state(b: Tensor, c: Tensor, log_decay: Tensor, reverse: bool = False) -> Tensor:
    """The state after a row that starts from zero, fp32 [B, H, D, E], without attention's output.

    The sum over t of decay^(T - 1 - t) b_t c_t^T; with `reverse` that of decay^(t + 1) b_t c_t^T.
    """
    b, c = _readable(b), _readable(c)
    B, T, H, D = b.shape
    E, device = c.shape[-1], _device(b)
    scan = _Scan(log_decay.contiguous(), None, None, T, reverse)
    config = state_config(D, b.element_size(), device)
    programs = B * H * triton.cdiv(E, config.cols)
    max_sub_splits = max(1, min(4 * device.num_sms // programs, T // (8 * config.chunk)))
    sub_split = triton.cdiv(triton.cdiv(T, max_sub_splits), config.chunk) * config.chunk
    num_sub_splits = triton.cdiv(T, sub_split)
    states = _states(scan, sub_split, num_sub_splits, num_sub_splits * sub_split - T, b, c, None, False)
    return states[:, :, -1].unflatten(-1, (D, E))


def triton_backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dq, dk, dv (written to `into` if given) and the gradient of the initial state (None if there was none)."""
    do, q, k, v = _readable(do), _readable(q), _readable(k), _readable(v)
    forward, backward = _scans(q, log_decay, cu_seqlens)
    initial, dfinal = _optional(initial_state), _optional(dfinal)
    dq, dk, dv = into or (_like(q), _like(k), _like(v))
    dinitial = None if initial is None else torch.empty_like(initial)
    _attend(forward, do, v, k, dq, initial, None, transposed=True)
    if q.shape[-1] == v.shape[-1]:
        _attend(backward, v, do, q, dk, dfinal, dinitial, transposed=True, second=(k, dv))
    else:
        _attend(backward, v, do, q, dk, dfinal, dinitial, transposed=True)
        _attend(backward, k, q, do, dv, dfinal, None, transposed=False)
    return dq, dk, dv, dinitial
