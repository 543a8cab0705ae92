"""TransNormerLLM for Hugging Face transformers, in torch, with Triton kernels on CUDA if Triton is installed.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    model.generate(**tokenizer(["Once upon", "In the end it"], padding=True, return_tensors="pt"))

`past_key_values` is a `TnllmState`: one fp32 matrix per head and layer, whose size does not depend on the length. Padding
on either side never enters it, because a padded batch is packed into one row of its real tokens.

Papers: TransNormerLLM (arXiv 2307.14995), Lightning Attention-2 (arXiv 2401.04658), TNL (arXiv 2405.17381).
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tnllm.convert.hf_code.configuration_tnllm import TnllmConfig
from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.layers import LRPE, ResidualBlock, make_norm


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


class TnllmBlock(ResidualBlock):
    """Pre-norm residual block: token mixer, then channel mixer."""

    def __init__(self, config: TnllmConfig, layer: int) -> None:
        super().__init__(config, GatedLinearAttention(config, layer))


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
            module.reset()
        elif isinstance(module, GatedLinearAttention):
            # Not in the files; transformers 5 builds it without a value.
            module.reset_decay()

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
        self.final_norm = make_norm(config, config.model_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def init_state(self, batch: int, device: torch.device) -> TnllmState:
        """Return the zero state."""
        mixers: list[GatedLinearAttention] = [block.token_mixer for block in self.layers]  # type: ignore[misc]
        layers = [mixer.new_state(batch, device) for mixer in mixers]
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
            x = x * self.config.model_dim**0.5
        if self.config.position == "ape":
            x = x + self.embed_positions(positions)
        hidden_states: list[Tensor] = []
        for index, block in enumerate(self.layers):
            if output_hidden_states:
                hidden_states.append(self._unpack(x, mask))
            before = None if state is None else state.layers[index]
            if self.gradient_checkpointing and self.training:
                x, after = self._gradient_checkpointing_func(block.__call__, x, positions, before, cu_seqlens)
            else:
                x, after = block(x, positions, before, cu_seqlens)
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
