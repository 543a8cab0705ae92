"""Lightning Attention behind the signatures of other projects: change the import, keep the call.

    from tnllm.kernels.drop_in import chunk_simple_gla            # fla.ops.simple_gla, with g_gamma
    from tnllm.kernels.drop_in import chunk_lightning_attn        # fla.ops.lightning_attn
    from tnllm.kernels.drop_in import lightning_attn_func         # lightning_attn.ops
    from tnllm.kernels.drop_in import lightning_attention, linear_decode_forward_triton     # vLLM's lightning_attn

Needs torch alone (and Triton on a GPU), no configuration. Layouts, scales and states are theirs. What they accept and this
package does not compute raises ValueError: data-dependent gates, and head dims outside `HEAD_DIMS` on a GPU.
"""

import torch
from torch import Tensor

from tnllm.kernels.lightning_attention import lightning_attention as _attention
from tnllm.kernels.lightning_attention import lightning_attention_step


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """fla's `chunk_simple_gla` with the constant log-decays `g_gamma` [H] (no gradient).

    q, k [B, T, H, K], v [B, T, H, V]; scale: K^-0.5 if None; states [N, H, K, V] fp32, [N, H, V, K] with `state_v_first`;
    cu_seqlens [N + 1] of any integer type packs N texts in one row. `cu_seqlens_cpu` is not needed: nothing here waits for
    the host. Returns o [B, T, H, V] and the final state, None unless `output_final_state`. Raises ValueError with `g`.
    """
    if g is not None or g_gamma is None:
        raise ValueError("only constant decays are computed here: give g_gamma [H], not g; gates by token are fla's")
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is not None:
        initial_state = (initial_state.mT if state_v_first else initial_state).to(_wide(q))
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
    o, final = _attention(q * scale, k, v, g_gamma.float(), initial_state, offsets, output_final_state)
    return o, (final.mT if state_v_first else final) if output_final_state else None


def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """fla's `chunk_lightning_attn`: `chunk_simple_gla` with the log-decay -8 h / H (1 - layer_idx / num_layers) of head h.

    Head 0 never forgets: these are fla's slopes, not the 2^(-8 (h + 1) / H) of released models.
    """
    heads = torch.arange(q.shape[2], dtype=torch.float32, device=q.device)
    decay = -8 / q.shape[2] * (1 - layer_idx / num_layers) * heads
    return chunk_simple_gla(q, k, v, None, decay, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def lightning_attn_func(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """The official `lightning_attn_func`: q, k [B, H, T, D], v [B, H, T, E], slopes s >= 0 of H elements → o [B, H, T, E].

    No scale; the decay is exp(-s).
    """
    q, k, v = _swapped(q, k, v)
    o, _ = _attention(q, k, v, -s.detach().flatten().float(), need_state=False)
    return o.transpose(1, 2)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, ed: Tensor, block_size: int = 256, kv_history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """vLLM's prefill: q, k [B, H, T, D], v [B, H, T, E], slopes ed of H elements, state kv_history [B, H, D, E] fp32.

    `kv_history` is not changed. Returns o [B, H, T, E] and the states [B, H, 1, D, E], whose `[:, :, -1]` continues the
    text, as callers of vLLM's take it; the states at its block boundaries, which come before that one there, are not
    computed. `block_size` is vLLM's tile and has no effect.
    """
    history = None if kv_history is None else kv_history.to(_wide(q))
    q, k, v = _swapped(q, k, v)
    o, final = _attention(q, k, v, -ed.detach().flatten().float(), history)
    return o.transpose(1, 2), final.unsqueeze(2)


def linear_decode_forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_caches: Tensor,
    slope_rate: Tensor,
    slot_idx: Tensor,
    BLOCK_SIZE: int = 32,
) -> Tensor:
    """vLLM's decoding step: q, k, v [B, H, 1, D] → o [B, H * D].

    Row slot_idx[b] of kv_caches [slots, H, D, D] is updated; fp32 on a GPU, as vLLM keeps it.

    Slots below 0 are padding: nothing of them is read or written, and their rows of o are zero (vLLM's are undefined).
    `BLOCK_SIZE` is vLLM's tile and has no effect. On a GPU nothing waits for the host.
    """
    decay = -slope_rate.detach().flatten().float()
    q, k, v = (x.squeeze(2) for x in (q, k, v))
    used = slot_idx >= 0
    if q.is_cuda:
        from tnllm.kernels.lightning_attention.step import triton_step

        o = triton_step(q, k, v, decay, kv_caches, slot_idx, torch.zeros_like(used))
        return o.masked_fill(~used[:, None, None], 0.0).flatten(1)
    rows = slot_idx[used].long()
    state = kv_caches[rows].to(_wide(q))
    o = torch.zeros_like(v)
    o[used] = lightning_attention_step(q[used], k[used], v[used], decay, state)
    kv_caches[rows] = state.to(kv_caches.dtype)
    return o.flatten(1)


def _swapped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, D] as [B, T, H, D], without a copy."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
