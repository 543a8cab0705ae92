"""TransNormerLLM for Hugging Face transformers, in torch, with Triton kernels on CUDA if Triton is installed.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    model.generate(**tokenizer(["Once upon", "In the end it"], padding=True, return_tensors="pt"))

`past_key_values` is a `TnllmState`: one fp32 matrix per head and layer, whose size does not depend on the length. Padding
on either side never enters it, because a padded batch is packed into one row of its real tokens.

Papers: TransNormerLLM (arXiv 2307.14995), Lightning Attention-2 (arXiv 2401.04658), TNL (arXiv 2405.17381).
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tnllm.convert.hf_code.configuration_tnllm import TnllmConfig
from tnllm.kernels.lightning_attention.chunk import chunk_backward, chunk_forward, chunk_step

try:
    # Used by the next file only, but transformers 4 copies only files that this file imports.
    from tnllm.kernels.lightning_attention.kernels import attend_kernel  # noqa: F401
    from tnllm.kernels.lightning_attention.launch import triton_backward, triton_forward
    from tnllm.kernels.lightning_attention.step import triton_step

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

# Head dims that the Triton kernels support; others use the torch implementation.
TRITON_DIMS = (32, 64, 96, 128, 192, 256)


def use_triton(q: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernels support these tensors."""
    supported = q.shape[-1] in TRITON_DIMS and v.shape[-1] in TRITON_DIMS and q.dtype != torch.float64
    return HAS_TRITON and q.is_cuda and supported


class LightningAttention(torch.autograd.Function):
    """S_t = exp(log_decay) S_{t-1} + k_t v_t^T and o_t = q_t^T S_t per head, from an initial state, with packing.

    q, k [B, T, H, D], v [B, T, H, E], log_decay [H] fp32, state [B or N, H, D, E] fp32 or None, cu_seqlens [N + 1] or None.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v, log_decay, state, cu_seqlens)
        ctx.set_materialize_grads(False)
        if use_triton(q, v):
            return triton_forward(q, k, v, log_decay, state, cu_seqlens, True)
        return chunk_forward(q, k, v, log_decay, state, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do
        run = triton_backward if use_triton(q, v) else chunk_backward
        dq, dk, dv, dstate = run(do, dfinal, q, k, v, log_decay, state, cu_seqlens)
        return dq, dk, dv, None, None if state is None else dstate, None


class TnllmState:
    """Recurrent state of each layer, [B, H, D, E] fp32. A forward pass updates it in place.

    `length` is the number of columns read, padding included; `position` [B] the number of tokens of each row.
    """

    is_compileable = False

    def __init__(self, layers: list[Tensor], position: Tensor, length: int = 0) -> None:
        self.layers, self.position, self.length = layers, position, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, for beam search."""
        self.layers = [layer.index_select(0, beam_idx.to(layer.device)) for layer in self.layers]
        self.position = self.position.index_select(0, beam_idx.to(self.position.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        rows = torch.arange(self.position.shape[0], device=self.position.device).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self.reorder_cache(indices)


def geometric_slopes(num_heads: int) -> list[float]:
    """Return the decay slopes of the released models (ALiBi's) for any number of heads."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    if power < num_heads:
        slopes += geometric_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def log_decays(config: TnllmConfig) -> Tensor:
    """Return log-decays [L, H], always fp32: in bfloat16 those of the last layers would round to zero."""
    if config.position in ("lrpe", "ape"):
        return torch.zeros(config.num_layers, config.num_heads, dtype=torch.float32, device="cpu")
    rows = []
    for layer in range(config.num_layers):
        if config.decay_slopes == "geometric":
            slopes = geometric_slopes(config.num_heads)
            depth = layer / (config.num_layers - 1) if config.num_layers > 1 else 0.0
            factor = 1.0 - depth + 1e-5
        else:
            slopes = [8.0 * head / config.num_heads for head in range(config.num_heads)]
            factor = 1.0 - layer / config.num_layers
        rows.append([-slope * (factor if config.decay_temperature else 1.0) for slope in slopes])
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


class SRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) without parameters; the mean is fp32."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


def make_norm(config: TnllmConfig) -> nn.Module:
    """Return the config's norm over model_dim channels."""
    if config.norm == "srmsnorm":
        return SRMSNorm(config.norm_eps)
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.model_dim, eps=config.norm_eps)
    return nn.LayerNorm(config.model_dim, eps=config.norm_eps, bias=False)


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply the activation with this name."""
    if kind == "silu":
        return F.silu(x)
    if kind == "1+elu":
        return 1.0 + F.elu(x)
    return F.relu(x) if kind == "relu" else x


class LRPE(nn.Module):
    """Maps x at position t to [a cos(theta t); a sin(theta t)], a = activation(x). theta [H, 1, d] stays fp32."""

    def __init__(self, config: TnllmConfig) -> None:
        super().__init__()
        self.shape = (config.num_heads, 1, config.head_dim)
        self.theta = nn.Parameter(torch.empty(self.shape, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> "LRPE":
        # A cast of the model to 16 bits leaves theta as it was.
        theta = self.theta.detach()
        super()._apply(fn, recurse)
        if self.theta.element_size() < 4:
            self.theta.data = theta.to(self.theta.device)
        return self

    def initial(self) -> Tensor:
        """Initial value: 10000^(-2j/M) for the flat index j, head-major."""
        count = self.shape[0] * self.shape[2]
        flat = [10_000.0 ** (-2.0 * index / count) for index in range(count)]
        return torch.tensor(flat, dtype=torch.float32, device="cpu").view(self.shape)

    def forward(self, x: Tensor, positions: Tensor, activation: str) -> Tensor:
        a = activate(x.to(torch.promote_types(x.dtype, torch.float32)), activation)
        # Angles reach 10^6 at a million tokens, so they are computed and reduced in float64.
        angle = positions[:, :, None, None].double() * self.theta[:, 0].double()
        angle = (torch.remainder(angle + math.pi, 2 * math.pi) - math.pi).to(a.dtype)
        return torch.cat([a * angle.cos(), a * angle.sin()], dim=-1).to(x.dtype)


class GatedLinearAttention(nn.Module):
    """Token mixer: projection, activation, LRPE if used, Lightning Attention, norm over all heads, gate, projection."""

    def __init__(self, config: TnllmConfig, layer: int) -> None:
        super().__init__()
        self.config, width = config, config.model_dim
        if config.gate == "full":
            self.qkvu_proj = nn.Linear(width, 4 * width, bias=False)
        else:
            self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        if config.gate == "low-rank":
            self.output_gate = nn.Sequential(
                nn.Linear(width, config.gate_dim, bias=False), nn.Linear(config.gate_dim, width, bias=False)
            )
        self.out_proj = nn.Linear(width, width, bias=False)
        self.norm = make_norm(config)
        self.lrpe = LRPE(config) if config.uses_lrpe(layer) else None

    def forward(
        self, x: Tensor, positions: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, M], positions [B, T], log_decay [H], state [B or N, H, D, E] → y [B, T, M], new state.

        One token with a state and without gradients is a decoding step, which updates the state in place.
        """
        config = self.config
        gate = None
        if config.gate == "full":
            q, k, v, gate = self.qkvu_proj(x).chunk(4, dim=-1)
        else:
            q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
            if config.gate == "low-rank":
                gate = torch.sigmoid(self.output_gate(x))
        q, k, v = (part.unflatten(-1, (config.num_heads, config.head_dim)) for part in (q, k, v))
        v = activate(v, config.value_activation)
        if self.lrpe is not None:
            q = self.lrpe(q, positions, config.activation)
            k = self.lrpe(k, positions, config.activation)
        else:
            q, k = activate(q, config.activation), activate(k, config.activation)
        if x.shape[1] == 1 and cu_seqlens is None and state is not None and not torch.is_grad_enabled():
            step = triton_step if use_triton(q, v) else chunk_step
            y = step(q[:, 0], k[:, 0], v[:, 0], log_decay, state)[:, None]
        else:
            y, state = LightningAttention.apply(q, k, v, log_decay, state, cu_seqlens)
        y = y.flatten(-2)
        if config.norm_position == "attention":
            y = self.norm(y)
        y = y if gate is None else y * gate
        if config.norm_position == "gate":
            y = self.norm(y)
        y = self.out_proj(y)
        return self.norm(y) if config.norm_position == "output" else y, state


class GLU(nn.Module):
    """Channel mixer ((x W1) * (x W2)) W3."""

    def __init__(self, config: TnllmConfig) -> None:
        super().__init__()
        self.activation = config.glu_activation
        self.l1 = nn.Linear(config.model_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.model_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(activate(self.l1(x), self.activation) * self.l2(x))


class TnllmBlock(nn.Module):
    """Pre-norm residual block: token mixer, then channel mixer."""

    def __init__(self, config: TnllmConfig, layer: int) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = make_norm(config), make_norm(config)
        self.token_mixer = GatedLinearAttention(config, layer)
        self.channel_mixer = GLU(config)

    def forward(
        self, x: Tensor, positions: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, M] → x [B, T, M], and the layer's new state."""
        mixed, state = self.token_mixer(self.token_norm(x), positions, log_decay, state, cu_seqlens)
        x = x + mixed
        return x + self.channel_mixer(self.channel_norm(x)), state


class TnllmPreTrainedModel(PreTrainedModel):
    """Base class: what transformers reads from every model class."""

    config_class = TnllmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TnllmBlock"]
    # In 16 bits, LRPE's angles would be wrong by hundreds of radians at position 100,000.
    _keep_in_fp32_modules: ClassVar[list[str]] = ["theta"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["theta"]
    # The state cannot be rolled back to an earlier token, so assisted generation is not possible.
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, self.config.init_std)
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LRPE):
            with torch.no_grad():
                module.theta.copy_(module.initial())

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class TnllmModel(TnllmPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: TnllmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.model_dim)
        if config.position == "ape":
            self.embed_positions = nn.Embedding(config.max_position, config.model_dim)
        self.layers = nn.ModuleList(TnllmBlock(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config)
        self.gradient_checkpointing = False
        # Log-decays per device; not a buffer, so that neither a cast nor a checkpoint can change them.
        self._decays: dict[torch.device, Tensor] = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def init_state(self, batch: int, device: torch.device) -> TnllmState:
        """Return the zero state."""
        config = self.config
        wide = torch.float64 if self.embed_tokens.weight.dtype == torch.float64 else torch.float32
        layers = []
        for layer in range(config.num_layers):
            key_dim = config.head_dim * (2 if config.uses_lrpe(layer) else 1)
            layers.append(torch.zeros(batch, config.num_heads, key_dim, config.head_dim, dtype=wide, device=device))
        return TnllmState(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TnllmState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids [B, T]; attention_mask [B, T] or [B, columns read + T], 0 or False at padding.

        Positions come from the mask and the state; `position_ids` is ignored.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, columns = x.shape[:2]
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        state = past_key_values
        if state is None and use_cache:
            state = self.init_state(batch, x.device)
        start = torch.zeros(batch, dtype=torch.int64, device=x.device) if state is None else state.position
        mask = self._padding(attention_mask, batch, columns)
        cu_seqlens = None
        if mask is None:
            lengths = torch.full_like(start, columns)
            positions = start[:, None] + torch.arange(columns, device=x.device)
        else:
            lengths = mask.sum(-1)
            cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            positions = (start[:, None] + mask.cumsum(-1) - 1)[mask][None]
            x = x[mask][None]
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.model_dim)
        if self.config.position == "ape":
            x = x + self.embed_positions(positions)
        hidden_states: list[Tensor] = []
        for index, block in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(self._unpack(x, mask))
            before = None if state is None else state.layers[index]
            log_decay = self._decays_on(x.device)[index]
            if self.gradient_checkpointing and self.training:
                x, after = self._gradient_checkpointing_func(
                    block.__call__, x, positions, log_decay, before, cu_seqlens
                )
            else:
                x, after = block(x, positions, log_decay, before, cu_seqlens)
            if state is not None:
                state.layers[index] = after
        if state is not None:
            state.position = state.position + lengths
            state.length += columns
        x = self._unpack(self.final_norm(x), mask)
        if output_hidden_states:
            hidden_states.append(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=state if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def _padding(attention_mask: Tensor | None, batch: int, columns: int) -> Tensor | None:
        """[B, T] bool, False at padding; None if there is no padding in the new columns."""
        if attention_mask is None:
            return None
        mask = attention_mask[:, -columns:].bool()
        if mask.shape != (batch, columns):
            raise ValueError(f"attention_mask must end in {[batch, columns]}; got {list(attention_mask.shape)}")
        return None if bool(mask.all()) else mask

    def _decays_on(self, device: torch.device) -> Tensor:
        if device not in self._decays:
            self._decays[device] = log_decays(self.config).to(device)
        return self._decays[device]

    @staticmethod
    def _unpack(x: Tensor, mask: Tensor | None) -> Tensor:
        """[1, real tokens, M] → [B, T, M], zeros at padding."""
        if mask is None:
            return x
        rows = x.new_zeros(*mask.shape, x.shape[-1])
        return rows.masked_scatter(mask[..., None], x[0])


class TnllmForCausalLM(TnllmPreTrainedModel, GenerationMixin):
    """The model with a language-model head; logits are fp32."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TnllmConfig) -> None:
        super().__init__(config)
        self.model = TnllmModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TnllmState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """labels [B, T] are shifted here; -100 is ignored. logits_to_keep: number of last columns, 0 for all."""
        output = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        result = CausalLMOutputWithPast(loss, logits, output.past_key_values, output.hidden_states)
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: TnllmState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs for the columns that the state has not read yet."""
        inputs: dict[str, Any] = {"past_key_values": past_key_values, "use_cache": use_cache, "logits_to_keep": 1}
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        if inputs_embeds is not None and read == 0:
            return {**inputs, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        # Number of new columns: transformers 5 passes it (None: all), transformers 4 passes their positions.
        if "next_sequence_length" in kwargs:
            new = kwargs["next_sequence_length"]
        else:
            new = None if kwargs.get("cache_position") is None else kwargs["cache_position"].shape[0]
        unread = input_ids if new is None else input_ids[:, -new:]
        # A single new token is never padding, and reading its mask would synchronize the device.
        mask = attention_mask if unread.shape[1] > 1 or read == 0 else None
        return {**inputs, "input_ids": unread.contiguous(), "attention_mask": mask}
