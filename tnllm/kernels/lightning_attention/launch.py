"""Launch the Triton kernels: `triton_forward`, `triton_backward` and `triton_step`, called by `op.py` on CUDA.

Arguments and results are those of the chunked CPU form (`chunk.py`), so tests run either on the same inputs. Nothing
here depends on the values of tensors, so nothing waits for the GPU.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from tnllm.kernels.lightning_attention.kernels import attend_kernel, scan_states_kernel, segment_states_kernel


@dataclass(frozen=True)
class Config:
    """How one kernel is built: tokens per chunk, columns of c per program, Triton's warps and pipeline stages."""

    chunk: int
    cols: int
    num_warps: int
    num_stages: int
    trans: bool = False
    tma: bool = False
    prefetch: int = 0


@cache
def _device(index: int) -> tuple[int, int]:
    """Multiprocessors and shared memory per block in bytes."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _multiprocessors(x: Tensor) -> int:
    # On CPU (tests under Triton's interpreter) a small number, so that small tests cut sequences in segments.
    return _device(x.get_device())[0] if x.is_cuda else 4


def attend_config(a_dim: int, c_dim: int, itemsize: int) -> Config:
    return Config(64 if itemsize == 2 else 32, min(64, triton.next_power_of_2(c_dim)), 4 if a_dim <= 128 else 8, 2)


def states_config(a_dim: int, c_dim: int, itemsize: int) -> Config:
    return Config(64 if itemsize == 2 else 32, min(64, triton.next_power_of_2(c_dim)), 4 if a_dim <= 128 else 8, 3)


def _segment_length(T: int, num_programs: int, num_sms: int, chunk: int) -> int:
    """Tokens per segment: T unless too few programs would run to fill the GPU."""
    if 2 * num_programs >= 3 * num_sms:
        return T
    num_segments = max(1, 4 * num_sms // num_programs)
    length = max(-(-T // num_segments), 8 * chunk)
    return -(-length // chunk) * chunk


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(x: Tensor) -> str:
    # float32 operands as three tf32 products: error near 1e-6 on tensor cores (one tf32 product leaves 3e-4).
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


@dataclass(frozen=True)
class _Walk:
    """One direction of time over one batch: what all kernels of a forward or half a backward share."""

    log_decay: Tensor
    cu_seqlens: Tensor | None
    num_seqs: int
    T: int
    segment: int
    chunk: int
    reverse: bool

    @property
    def num_segments(self) -> int:
        return -(-self.T // self.segment)


def _states_before(
    walk: _Walk, b: Tensor, c: Tensor, initial: Tensor | None, transposed: bool, config: Config
) -> Tensor | None:
    """The state before each segment [B, H, segments, D, E], or None where one segment is all."""
    if walk.num_segments == 1:
        return None
    B, _, H, A = b.shape
    N = c.shape[-1]
    shape = (N, A) if transposed else (A, N)
    states = torch.empty(B, H, walk.num_segments, *shape, device=b.device, dtype=torch.float32)
    carries = torch.empty(walk.num_segments, device=b.device, dtype=torch.int32) if walk.cu_seqlens is not None else None
    grid = (H * triton.cdiv(N, config.cols), walk.num_segments - 1, B)
    segment_states_kernel[grid](
        b, c, walk.log_decay, initial, states, carries, walk.cu_seqlens,
        *b.stride()[:3], *c.stride()[:3], walk.T, H, walk.segment, walk.num_seqs,
        A=A, N=N, BA=triton.next_power_of_2(A), BC=config.cols, CHUNK=config.chunk,
        REVERSE=walk.reverse, STATE_TRANSPOSED=transposed, HAS_INITIAL=initial is not None,
        PACKED=walk.cu_seqlens is not None, PRECISION=_precision(b),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )
    scan_states_kernel[(A * N // 128, B * H)](
        states, walk.log_decay, initial, carries, H, walk.segment, walk.num_segments,
        SIZE=A * N, BLOCK=128, GROUP=8, HAS_INITIAL=initial is not None, PACKED=walk.cu_seqlens is not None, num_warps=4,
    )
    return states


def _attend(
    walk: _Walk, a: Tensor, b: Tensor, c: Tensor, out: Tensor, initial: Tensor | None, before: Tensor | None,
    final: Tensor | None, transposed: bool, config: Config, second: tuple[Tensor, Tensor] | None = None,
) -> None:
    B, T, H, A = a.shape
    N = c.shape[-1]
    a2, out2 = second or (a, out)
    grid = (H * triton.cdiv(N, config.cols) * (2 if second else 1), walk.num_segments, B)
    attend_kernel[grid](
        a, b, c, out, a2, out2, walk.log_decay, initial, before, final, walk.cu_seqlens,
        *a.stride()[:3], *b.stride()[:3], *c.stride()[:3], *out.stride()[:3], *a2.stride()[:3], *out2.stride()[:3],
        T, H, walk.segment, walk.num_seqs,
        A=A, N=N, BA=triton.next_power_of_2(A), BC=config.cols, CHUNK=config.chunk,
        REVERSE=walk.reverse, DUAL=second is not None, TRANS=config.trans, STATE_TRANSPOSED=transposed,
        HAS_INITIAL=initial is not None, HAS_BEFORE=before is not None, STORE_FINAL=final is not None,
        PACKED=walk.cu_seqlens is not None, RAGGED=walk.cu_seqlens is not None or T % config.chunk != 0,
        TMA=config.tma, PREFETCH=config.prefetch, PRECISION=_precision(a), num_warps=config.num_warps, num_stages=config.num_stages,
    )


def _walk(q: Tensor, splits: int, chunk: int, log_decay: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> _Walk:
    B, T, H, _ = q.shape
    num_seqs = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segment = _segment_length(T, B * H * splits, _multiprocessors(q), chunk)
    return _Walk(log_decay, cu_seqlens, num_seqs, T, segment, chunk, reverse)


def _new_final(initial: Tensor | None, walk: _Walk, like: Tensor, D: int, E: int) -> Tensor:
    # Packed sequences may be empty, and then no program writes their state: it stays the initial one.
    shape = (walk.num_seqs, like.shape[2], D, E)
    if walk.cu_seqlens is None:
        return torch.empty(shape, device=like.device, dtype=torch.float32)
    if initial is None:
        return torch.zeros(shape, device=like.device, dtype=torch.float32)
    return initial.clone(memory_format=torch.contiguous_format)


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = _dense(q), _dense(k), _dense(v)
    D, E = q.shape[-1], v.shape[-1]
    initial = None if initial_state is None else initial_state.contiguous()
    config = attend_config(D, E, q.element_size())
    walk = _walk(q, triton.cdiv(E, config.cols), config.chunk, log_decay.contiguous(), cu_seqlens, reverse=False)
    before = _states_before(walk, k, v, initial, False, states_config(D, E, q.element_size()))
    o = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    final = _new_final(initial, walk, q, D, E) if need_state else None
    _attend(walk, q, k, v, o, initial, before, final, False, config)
    return o, final


def triton_backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    do, q, k, v = _dense(do), _dense(q), _dense(k), _dense(v)
    D, E, size = q.shape[-1], v.shape[-1], q.element_size()
    initial = None if initial_state is None else initial_state.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    log_decay = log_decay.contiguous()
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))

    config = attend_config(E, D, size)
    walk = _walk(q, triton.cdiv(D, config.cols), config.chunk, log_decay, cu_seqlens, reverse=False)
    before = _states_before(walk, v, k, initial, True, states_config(E, D, size))
    _attend(walk, do, v, k, dq, initial, before, None, True, config)

    walk = _walk(q, triton.cdiv(D, config.cols), config.chunk, log_decay, cu_seqlens, reverse=True)
    before = _states_before(walk, do, q, dfinal, True, states_config(E, D, size))
    dinitial = None if initial is None else _new_final(dfinal, walk, q, D, E)
    if D == E:
        _attend(walk, v, do, q, dk, dfinal, before, dinitial, True, config, second=(k, dv))
    else:
        _attend(walk, v, do, q, dk, dfinal, before, dinitial, True, config)
        config = attend_config(D, E, size)
        _attend(walk, k, q, do, dv, dfinal, before, None, False, config)
    return dq, dk, dv, dinitial
