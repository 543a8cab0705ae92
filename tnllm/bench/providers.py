"""Attention implementations for `tnllm bench-attn`: ours and the peers', each as `attend(q, k, v, log_decay) -> o`.

Inputs are [B, T, H, D]; a peer with another layout gets a contiguous copy before the clock starts. A peer that computes
another function says so in `differs`, and is checked against the definition of that one.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tnllm.kernels.lightning_attention import lightning_attention
from tnllm.kernels.lightning_attention.reference import quadratic

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return quadratic(q, k, v, log_decay)[0]


def _scaled_linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return quadratic(q * q.shape[-1] ** -0.5, k, v, log_decay)[0]


def _softmax(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Causal softmax attention on [B, T, H, D], spelled out."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    keep = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    return torch.einsum("bhij,bjhe->bihe", scores.masked_fill(~keep, float("-inf")).softmax(-1), v)


# Share of the old value that the delta rule replaces: the same for every token.
_BETA = 0.5


def _gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """S_t = decay S_{t-1} + beta k_t (v_t - decay S_{t-1}^T k_t)^T; o_t = S_t^T q_t / sqrt(D); q and k normalised."""
    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    state, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(q.shape[1]):
        state = log_decay.to(q.dtype).exp()[:, None, None] * state
        error = v[:, t] - torch.einsum("bhde,bhd->bhe", state, k[:, t])
        state = state + _BETA * k[:, t, :, :, None] * error[:, :, None]
        outputs.append(torch.einsum("bhde,bhd->bhe", state, q[:, t]))
    return torch.stack(outputs, 1) * q.shape[-1] ** -0.5


@dataclass(frozen=True)
class Provider:
    """One implementation.

    `differs`: how its function or interface differs from ours; `definition`: what it computes, spelled out;
    `heads_first`: takes [B, H, T, D]; `multiple`: of which its lengths must be; `backward`: whether it has gradients;
    `devices`: device types it runs on; `module`: the package it needs; `state`: returns the final state.
    """

    name: str
    attend: Attend
    definition: Attend = _linear
    differs: str = ""
    heads_first: bool = False
    devices: tuple[str, ...] = ("cuda",)
    module: str | None = None
    multiple: int = 1
    backward: bool = True
    quadratic_memory: bool = False
    state: Attend | None = None

    @property
    def softmax(self) -> bool:
        return self.definition is _softmax

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.module is not None and find_spec(self.module.split(".")[0]) is None:
            return f"{self.module} is not installed"
        if self.name in ("sdpa-flash", "sdpa-cudnn", "flash-qla", "flashinfer") and dtype == torch.float32:
            return "needs bf16 or fp16"
        return None


def _plain_torch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The masked left product [(q k^T) * decay] v, [T, T] per head: the papers' point of comparison.

    The mask is kept between calls, as models do, so it is neither timed nor counted as extra memory.
    """
    key = (len(log_decay), q.shape[2], q.dtype, q.device)
    if key not in _MASKS:
        _MASKS.clear()
        # One head at a time: the full mask in fp32 would be the largest tensor of the benchmark.
        step = torch.arange(q.shape[2], device=q.device)
        gap = step[:, None] - step
        heads = [torch.where(gap >= 0, (g * gap.clamp(min=0)).exp(), 0.0).to(q.dtype) for g in log_decay]
        _MASKS[key] = torch.stack(heads)
    return ((q @ k.mT) * _MASKS[key]) @ v


_MASKS: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def _fla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: bool = False) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0, output_final_state=state)[int(state)]


def _official(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from lightning_attn.ops import lightning_attn_func

    return lightning_attn_func(q, k, v, -log_decay.view(-1, 1, 1))


def _tfla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import mlstm_siging_chunkwise__xl_chunk

    # Input and forget gates [B, H, T] before their sigmoids, which make of them 1 and the decay.
    input_gate = q.new_full(q.shape[:3], 30.0, dtype=torch.float32)
    decay_logit = log_decay - (-torch.expm1(log_decay)).log()
    forget_gate = decay_logit[:, None].expand(q.shape[:3]).contiguous()
    return mlstm_siging_chunkwise__xl_chunk(
        q, k, v, input_gate, forget_gate, normalize=False, autocast_kernel_dtype=q.dtype
    )


def _flash_qla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from flash_qla import chunk_gated_delta_rule

    g = log_decay.expand(q.shape[:3]).contiguous()
    return chunk_gated_delta_rule(q, k, v, g, torch.full_like(g, _BETA), use_qk_l2norm_in_kernel=True)[0]


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    B, T = q.shape[:2]
    decay = log_decay.exp().expand(B * T, -1).contiguous()
    rows = (x.flatten(0, 1) for x in (q, k, v))
    lengths = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
    out = chunk_gated_delta_rule(
        *rows, decay, torch.full_like(decay, _BETA), cu_seqlens=lengths, use_qk_l2norm_in_kernel=True
    )
    return out.view(v.shape)


def _sdpa(backend: SDPBackend | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


_DELTA = "gated delta rule with normalised q and k"

PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            "tnllm", lambda *x: lightning_attention(*x)[0], devices=("cuda", "cpu"),
            state=lambda *x: lightning_attention(*x)[1],
        ),
        Provider("torch", _plain_torch, heads_first=True, devices=("cuda", "cpu"), quadratic_memory=True),
        Provider("fla", _fla, module="fla", state=partial(_fla, state=True)),
        Provider("lightning-attn", _official, heads_first=True, module="lightning_attn"),
        Provider(
            "mlstm", _tfla, _scaled_linear, "gates by token, scale D^-0.5", heads_first=True, multiple=128,
            module="mlstm_kernels",
        ),
        Provider("flash-qla", _flash_qla, _gated_delta_rule, f"{_DELTA}, gates by token", module="flash_qla"),
        Provider(
            "flashinfer", _flashinfer, _gated_delta_rule, f"{_DELTA}, gates by token, no gradients", backward=False,
            module="flashinfer",
        ),
        Provider("sdpa-flash", _sdpa(SDPBackend.FLASH_ATTENTION), _softmax, "softmax", heads_first=True),
        Provider("sdpa-cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), _softmax, "softmax", heads_first=True),
        Provider("sdpa", _sdpa(None), _softmax, "softmax", heads_first=True, devices=("cpu",)),
    )
}  # fmt: skip


def outputs_and_gradients(provider: Provider, inputs: list[Tensor], log_decay: Tensor) -> dict[str, Tensor]:
    """o, dq, dk and dv for `inputs` q, k, v and do, all [B, T, H, D]; o alone of a provider without gradients."""
    inputs = [x.transpose(1, 2).contiguous() if provider.heads_first else x.clone() for x in inputs]
    q, k, v = leaves = [x.requires_grad_() for x in inputs[:3]]
    out = provider.attend(q, k, v, log_decay)
    grads = torch.autograd.grad(out, leaves, inputs[3]) if provider.backward else ()
    results = out.detach(), *grads
    if provider.heads_first:
        results = tuple(x.transpose(1, 2) for x in results)
    return dict(zip(("o", "dq", "dk", "dv"), results, strict=False))
