"""The public operators: argument checks, device dispatch, autograd and torch.compile.

    o, final_state = lightning_attention(q, k, v, log_decay, initial_state=None, cu_seqlens=None)
    o = lightning_attention_step(q, k, v, log_decay, state)

Forward, backward and step are each one `torch.library` custom op, so torch.compile sees no graph break. CUDA tensors use
the Triton kernels, CPU tensors the chunked torch form.
"""

from types import ModuleType

import torch
from torch import Tensor

from tnllm.kernels.lightning_attention import chunk

HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # of q and k, and of v: those the Triton kernels are tested with
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention: S_t = exp(log_decay) S_{t-1} + k_t v_t^T and o_t = q_t^T S_t in every head.

    q, k [B, T, H, D] and v [B, T, H, E] of one dtype (bf16, fp16, fp32; on CPU also float64), any strides,
    T >= 1. On CUDA, D and E are in HEAD_DIMS.
    log_decay [H] fp32, finite and <= 0, a constant: it gets no gradient.
    initial_state [B, H, D, E] fp32 (float64 for float64 inputs), None for zeros.
    cu_seqlens [N + 1] int32 packs N sequences, empty ones allowed, in one row (B = 1): offsets from 0 to T, non-decreasing.
    The states are then [N, H, D, E]. On CUDA the values of log_decay and cu_seqlens are trusted: checking synchronises.
    Returns o [B, T, H, E] in v's dtype, and the final state; passed as initial_state, it continues the sequence.
    need_state=False returns an empty tensor for it: writing one per packed sequence costs time.
    Raises ValueError for arguments that do not fit. Differentiable (once) in q, k, v and both states.
    Source: TransNormerLLM (arXiv 2307.14995) section 3.3, Lightning Attention-2 (arXiv 2401.04658).
    """
    _check(q, k, v, log_decay, token_dims=2)
    num_seqs = q.shape[0]
    if cu_seqlens is not None:
        fits = cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
        if not fits or q.shape[0] != 1:
            raise ValueError(
                "cu_seqlens must be int32 of shape [N + 1] and the batch 1, "
                f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)} and batch {q.shape[0]}"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(f"cu_seqlens must be on {q.device}, got {cu_seqlens.device}")
        num_seqs = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, q, v, num_seqs)
    return _forward(q, k, v, log_decay, initial_state, cu_seqlens, need_state)


def lightning_attention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """One decoding step: S <- exp(log_decay) S + k v^T in place, o = q^T S.

    q, k [B, H, D], v [B, H, E] of one dtype; log_decay [H] fp32; state [B, H, D, E] fp32 (float64 for float64
    inputs). Returns o [B, H, E] in v's dtype. No gradient. Raises ValueError for arguments that do not fit; on CUDA the
    values of log_decay are trusted.
    """
    _check(q, k, v, log_decay, token_dims=1)
    _check_state("state", state, q, v, q.shape[0])
    return _step(q, k, v, log_decay, state)


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, token_dims: int) -> None:
    names = "[B, T, H, D]" if token_dims == 2 else "[B, H, D]"
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, log_decay {list(log_decay.shape)}"
    if q.ndim != token_dims + 2 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"q and k must be {names} and v the same with E for D; got {shapes}")
    if log_decay.shape != q.shape[-2:-1] or log_decay.dtype != torch.float32:
        raise ValueError(f"log_decay must be float32 [H]; got {log_decay.dtype}, {shapes}")
    if q.numel() == 0 or v.numel() == 0:
        raise ValueError(f"every dimension must be at least 1; got {shapes}")
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device == log_decay.device:
        devices = f"{q.device}, {k.device}, {v.device}, {log_decay.device}"
        raise ValueError(f"q, k, v and log_decay must be on one device; got {devices}")
    if q.device.type == "cuda":
        if q.dtype == torch.float64:
            raise ValueError("float64 is for CPU; on CUDA use float32, bfloat16 or float16")
        if q.shape[-1] not in HEAD_DIMS or v.shape[-1] not in HEAD_DIMS:
            raise ValueError(f"on CUDA head dims must be in {HEAD_DIMS}; got {shapes}")
    elif q.device.type not in ("cpu", "meta"):
        raise ValueError(f"Lightning Attention runs on cuda and cpu; got tensors on {q.device}")


def _check_state(name: str, state: Tensor, q: Tensor, v: Tensor, num_seqs: int) -> None:
    shape = (num_seqs, *q.shape[-2:], v.shape[-1])
    if state.shape != shape or state.dtype != _state_dtype(q) or state.device != q.device:
        raise ValueError(
            f"{name} must be {_state_dtype(q)} {list(shape)} on {q.device}; "
            f"got {state.dtype} {list(state.shape)} on {state.device}"
        )


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_seqs = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(num_seqs, *q.shape[2:], v.shape[-1], dtype=_state_dtype(q))


def _launch() -> ModuleType:
    # Imported at first use: Triton is not installed on every platform.
    from tnllm.kernels.lightning_attention import launch

    return launch


def _no_state(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=_state_dtype(q))


@torch.library.custom_op("tnllm::lightning_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor]:
    if q.is_cuda:
        o, final = _launch().triton_forward(q, k, v, log_decay, initial_state, cu_seqlens, need_state)
    else:
        o, final = chunk.chunk_forward(q, k, v, log_decay, initial_state, cu_seqlens)
    return o, final if need_state and final is not None else _no_state(q)


@_forward.register_fake
def _(q: Tensor, k, v: Tensor, log_decay, initial_state=None, cu_seqlens: Tensor | None = None, need_state=True):
    return v.new_empty(v.shape), _new_state(q, v, cu_seqlens) if need_state else _no_state(q)


@torch.library.custom_op("tnllm::lightning_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backward = _launch().triton_backward if q.is_cuda else chunk.chunk_backward
    grads = backward(do, dfinal, q, k, v, log_decay, initial_state, cu_seqlens)
    return grads if initial_state is not None else (*grads[:3], _no_state(q))


@_backward.register_fake
def _(do, dfinal, q: Tensor, k: Tensor, v: Tensor, log_decay, initial_state: Tensor | None, cu_seqlens):
    dinitial = _no_state(q) if initial_state is None else torch.empty_like(initial_state)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


@torch.library.custom_op("tnllm::lightning_attention_step", mutates_args=("state",))
def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    if q.is_cuda:
        from tnllm.kernels.lightning_attention.step import triton_step

        return triton_step(q, k, v, log_decay, state)
    return chunk.chunk_step(q, k, v, log_decay, state)


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    return v.new_empty(v.shape)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, need_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.has_final = need_state
    ctx.set_materialize_grads(False)


def _autograd(ctx, do: Tensor | None, dfinal: Tensor | None):
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    if not ctx.has_final:
        dfinal = None  # it belongs to the empty placeholder
    dq, dk, dv, dinitial = _backward(do, dfinal, q, k, v, log_decay, initial_state, cu_seqlens)
    return dq, dk, dv, None, None if initial_state is None else dinitial, None, None


_forward.register_autograd(_autograd, setup_context=_save)
