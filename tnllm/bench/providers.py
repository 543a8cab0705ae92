"""Attention implementations for `tnllm bench-attn`: ours and the peers', each as `attend(q, k, v, log_decay) -> o`.

Inputs are [B, T, H, D]; a peer with another layout gets a contiguous copy before the clock starts. `softmax` peers compute
another function and are checked against its definition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnllm.kernels.lightning_attention import lightning_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation.

    `heads_first`: takes [B, H, T, D]; `devices`: device types it runs on; `module`: the package it needs; `state`: returns
    the final state.
    """

    name: str
    attend: Attend
    softmax: bool = False
    heads_first: bool = False
    devices: tuple[str, ...] = ("cuda",)
    module: str | None = None
    quadratic_memory: bool = False
    state: Attend | None = None

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.module is not None and find_spec(self.module.split(".")[0]) is None:
            return f"{self.module} is not installed"
        if self.name in ("sdpa-flash", "sdpa-cudnn") and dtype == torch.float32:
            return "needs bf16 or fp16"
        return None


def _ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return lightning_attention(q, k, v, log_decay)[0]


def _our_state(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return lightning_attention(q, k, v, log_decay)[1]


def _plain_torch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The masked left product [(q k^T) * decay] v, [T, T] per head: the papers' point of comparison."""
    mask = decay_mask(log_decay, q.shape[2], q.dtype)
    return ((q @ k.mT) * mask) @ v


_MASKS: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def decay_mask(log_decay: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[H, T, T]; cached between calls, as models do, so it is neither timed nor counted as extra memory."""
    key = (length, dtype, log_decay.device)
    if key not in _MASKS or _MASKS[key].shape[0] != len(log_decay):
        _MASKS.clear()
        # One head at a time: the full mask in fp32 would be the largest tensor of the benchmark.
        step = torch.arange(length, device=log_decay.device)
        gap = step[:, None] - step
        heads = [torch.where(gap >= 0, (g * gap.clamp(min=0)).exp(), 0.0).to(dtype) for g in log_decay]
        _MASKS[key] = torch.stack(heads)
    return _MASKS[key]


def _fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0)[0]


def _fla_state(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0, output_final_state=True)[1]


def _official(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from lightning_attn.ops import lightning_attn_func

    return lightning_attn_func(q, k, v, -log_decay.view(-1, 1, 1))


def _sdpa(backend: SDPBackend | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("tnllm", _ours, devices=("cuda", "cpu"), state=_our_state),
        Provider("torch", _plain_torch, heads_first=True, devices=("cuda", "cpu"), quadratic_memory=True),
        Provider("fla", _fla, module="fla", state=_fla_state),
        Provider("lightning-attn", _official, heads_first=True, module="lightning_attn"),
        Provider("sdpa-flash", _sdpa(SDPBackend.FLASH_ATTENTION), softmax=True, heads_first=True),
        Provider("sdpa-cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), softmax=True, heads_first=True),
        Provider("sdpa", _sdpa(None), softmax=True, heads_first=True, devices=("cpu",)),
    )
}


def outputs_and_gradients(provider: Provider, inputs: list[Tensor], log_decay: Tensor) -> dict[str, Tensor]:
    """o, dq, dk and dv for `inputs` q, k, v and do, all [B, T, H, D]."""
    inputs = [x.transpose(1, 2).contiguous() if provider.heads_first else x.clone() for x in inputs]
    q, k, v = leaves = [x.requires_grad_() for x in inputs[:3]]
    out = provider.attend(q, k, v, log_decay)
    results = out.detach(), *torch.autograd.grad(out, leaves, inputs[3])
    if provider.heads_first:
        results = tuple(x.transpose(1, 2) for x in results)
    return dict(zip(("o", "dq", "dk", "dv"), results, strict=True))


def softmax_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention on [B, T, H, D], spelled out."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    keep = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    return torch.einsum("bhij,bjhe->bihe", scores.masked_fill(~keep, float("-inf")).softmax(-1), v)
