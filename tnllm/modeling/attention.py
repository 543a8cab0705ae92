"""Gated linear attention, the token mixer of TransNormerLLM (arXiv 2307.14995 Eq. 3-4; arXiv 2405.17381 Eq. 11).

Order: project to q, k, v, u; activate q and k; LRPE where the layer uses it; Lightning Attention with the layer's
constant decays; norm over all heads at once; gate; output projection.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tnllm.kernels.gated_attention import attend, gated_attention
from tnllm.kernels.lightning_attention import lightning_attention, lightning_attention_step
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.decay import log_decay
from tnllm.modeling.layers import LRPE, SRMSNorm, activate, make_norm


class GatedLinearAttention(nn.Module):
    """Token mixer of one layer. Holds no recurrent state: states are passed in and returned."""

    log_decay: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = config.model_dim
        if config.gate == "full":
            self.qkvu_proj = nn.Linear(width, 4 * width, bias=False)
        else:
            self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        if config.gate == "low-rank":
            self.output_gate = nn.Sequential(
                nn.Linear(width, config.gate_dim, bias=False), nn.Linear(config.gate_dim, width, bias=False)
            )
        self.out_proj = nn.Linear(width, width, bias=False)
        self.norm = make_norm(config, width)
        self.lrpe = LRPE(config) if config.uses_lrpe(layer) else None
        # What training without a state calls; sequence parallelism replaces both.
        self.attend, self.gated_attention = attend, gated_attention
        self._heads = slice(None)
        self.register_buffer("log_decay", log_decay(config, layer), persistent=False)

    def keep_heads(self, heads: slice) -> None:
        """Keep the decays of these heads only (tensor parallelism); the caller shards the projections."""
        self._heads = heads
        self.reset_decay()

    def reset_decay(self) -> None:
        """Compute the decays, on the device where they are."""
        self.log_decay = log_decay(self.config, self.layer)[self._heads].to(self.log_decay.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "GatedLinearAttention":
        super()._apply(fn, recurse)
        # Casting a model must never round the decays, and leaving the meta device must fill them in.
        if not self.log_decay.is_meta:
            self.reset_decay()
        return self

    @property
    def _one_operator(self) -> bool:
        """Whether everything between the projections is the released form without LRPE, which is one fused operator."""
        config = self.config
        choices = (config.gate, config.activation, config.value_activation, config.norm_position)
        released = choices == ("full", "silu", "none", "attention")
        return released and self.lrpe is None and type(self.norm) is SRMSNorm

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, T, M] → q, k [B, T, H, D], v [B, T, H, E] and the gate [B, T, M]."""
        config = self.config
        if config.gate == "full":
            q, k, v, gate = self.qkvu_proj(x).chunk(4, dim=-1)
        else:
            q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
            gate = torch.sigmoid(self.output_gate(x)) if config.gate == "low-rank" else None
        # The number of heads comes from the tensor, so that tensor-parallel shards run the same code.
        q, k, v = (x.unflatten(-1, (-1, config.head_dim)) for x in (q, k, v))
        v = activate(v, config.value_activation)
        if self.lrpe is not None:
            q = self.lrpe(q, positions, config.activation)
            k = self.lrpe(k, positions, config.activation)
        else:
            q, k = activate(q, config.activation), activate(k, config.activation)
        return q, k, v, gate

    def _output(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        """[..., H, E] → [..., M]: norm over all heads, gate, projection; norm_position may move the norm further down."""
        y, norm_after = attended.flatten(-2), self.config.norm_position
        y = self.norm(y) if norm_after == "attention" else y
        y = y if gate is None else y * gate
        y = self.out_proj(self.norm(y) if norm_after == "gate" else y)
        return self.norm(y) if norm_after == "output" else y

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        longest: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, M], positions [B, T] int64, state [B or N, H, D, E] → y [B, T, M], new state.

        With state=None the sequence starts here and no final state is returned (training). `longest` is unused: it is for
        softmax attention.
        """
        if state is None and self._one_operator:
            y = self.gated_attention(self.qkvu_proj(x), self.log_decay, self.config.norm_eps, cu_seqlens)
            return self.out_proj(y), None
        q, k, v, gate = self._project(x, positions)
        if state is None:
            attended = self.attend(q, k, v, self.log_decay, cu_seqlens)
        else:
            attended, state = lightning_attention(q, k, v, self.log_decay, state, cu_seqlens)
        return self._output(attended, gate), state

    def step(self, x: Tensor, positions: Tensor, state: Tensor) -> Tensor:
        """One token per row: x [B, M], positions [B]; `state` [B, H, D, E] is updated in place."""
        q, k, v, gate = self._project(x[:, None], positions[:, None])
        attended = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], self.log_decay, state)
        return self._output(attended, None if gate is None else gate[:, 0])

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The state before any token: zeros [B, H, D, E], fp32 (float64 in a model of this `dtype`)."""
        config = self.config
        shape = (batch, config.num_heads, config.key_dim(self.layer), config.head_dim)
        return torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
