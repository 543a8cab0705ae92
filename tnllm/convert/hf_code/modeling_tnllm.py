"""TransNormerLLM for Hugging Face transformers, in torch, with Triton kernels on CUDA if Triton is installed.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    model.generate(**tokenizer(["Once upon", "In the end it"], padding=True, return_tensors="pt"))

`past_key_values` (from transformers 5.24 on also called `cache`) is a `TnllmState`: one fp32 matrix per head and layer,
whose size does not depend on the length; a layer of softmax attention, if there is one, has a key-value cache instead.
Padding on either side never enters a text. Several texts may lie in one row: see `rows.py`. An argument that is neither
used here nor empty is refused by name.

Papers: TransNormerLLM (arXiv 2307.14995), Lightning Attention-2 (arXiv 2401.04658), TNL (arXiv 2405.17381).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tnllm.convert.hf_code.configuration_tnllm import TnllmConfig
from tnllm.convert.hf_code.rows import (
    continued_positions,
    find_rows,
    last_real,
    packed_starts,
    padding_mask,
    softmax_mask,
)
from tnllm.convert.hf_code.state import TnllmState, own_state
from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.layers import LRPE, ResidualBlock, make_norm
from tnllm.modeling.transformer import make_mixer

# Keywords that `generate` hands on and that are not for the forward pass: it reads stop strings with a tokenizer.
NOT_FOR_THE_MODEL = ("labels", "tokenizer", "assistant_tokenizer")

try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:

    class GradientCheckpointingLayer(nn.Module):  # type: ignore[no-redef]
        """What later versions of transformers have: a layer that recomputes its activations when asked to."""

        gradient_checkpointing = False

        def __call__(self, *args: Any) -> Any:
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(super().__call__, *args)  # type: ignore[operator]
            return super().__call__(*args)


# Trainer smooths labels, and shifts them, by the names in this table; pipelines look there too.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("tnllm", "TnllmForCausalLM")


def refuse(name: str, arguments: dict[str, Any]) -> None:
    """Raise TypeError for an argument that asks for something. None, False and an empty value ask for nothing."""
    for key, value in arguments.items():
        if isinstance(value, Tensor) or value:
            raise TypeError(f"{name} does not take {key}; leave it out")


class TnllmBlock(GradientCheckpointingLayer, ResidualBlock):
    """Pre-norm residual block: token mixer, then channel mixer."""

    def __init__(self, config: TnllmConfig, layer: int) -> None:
        super().__init__(config, make_mixer(config, layer))


class TnllmPreTrainedModel(PreTrainedModel):
    """Base class: what transformers reads from every model class."""

    config_class = TnllmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch
    _no_split_modules: ClassVar[list[str]] = ["TnllmBlock"]
    # In 16 bits, LRPE's angles would be wrong by hundreds of radians at position 100,000.
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

    _auto_class = "AutoModel"  # so that save_pretrained writes the code too

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
        layers = [block.token_mixer.new_state(batch, device, self.dtype) for block in self.layers]  # type: ignore[operator, union-attr]
        visible = torch.zeros(batch, 0, dtype=torch.bool, device=device) if self.config.num_softmax else None
        return TnllmState(layers, torch.zeros(batch, dtype=torch.int64, device=device), 0, visible)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TnllmState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: TnllmState | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """input_ids [B, T]; attention_mask [B, T] or [B, columns read + T], 0 or False at padding.

        Positions come from the mask and the state. position_ids [B, T], cu_seq_lens_q and cu_seq_lens_k [N + 1] and seq_idx
        [B, T] tell where a text begins inside a row; max_length_q and max_length_k are not needed. Columns of padding hold
        the output of the last token before them. Raises ValueError for values that contradict each other or the state.
        """
        refuse(type(self).__name__, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.ndim != 3:
            given = x.shape if input_ids is None else input_ids.shape
            raise ValueError(f"input_ids must be [B, T] and inputs_embeds [B, T, M]; got {list(given)}")
        batch, columns = x.shape[:2]
        if batch == 0 or columns == 0:
            raise ValueError(
                f"the input is empty: {[batch, columns]} tokens; give at least one token per row, such as the begin "
                f"token {self.config.bos_token_id}"
            )
        state = own_state(past_key_values, cache)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        if state is None and use_cache:
            state = self.init_state(batch, x.device)
        if state is not None:
            state.check(batch, columns, cache_position)
        start = torch.zeros(batch, dtype=torch.int64, device=x.device) if state is None else state.position
        keep = padding_mask(attention_mask, batch, columns)
        starts = packed_starts(position_ids, (cu_seq_lens_q, cu_seq_lens_k), seq_idx, keep, start, (batch, columns))
        rows, positions, end = find_rows(keep, starts, start, (batch, columns))
        if self.config.scale_embedding:
            x = x * self.config.model_dim**0.5
        if self.config.position == "ape":
            x = x + self.embed_positions(positions)
        mask, visible = softmax_mask(rows, state, x) if self.config.num_softmax else (None, None)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: list[Tensor] = []
        for index, block in enumerate(self.layers):
            if wanted:
                hidden_states.append(x)
            between = mask if self.config.is_softmax(index) else rows
            x, after = block(x, positions, None if state is None else state.layers[index], between)
            if state is not None:
                state.layers[index] = after
        if state is not None:
            state.position, state.length, state.visible = end, state.length + columns, visible
        x = self.final_norm(x)
        if keep is not None:
            # So that a caller who takes the last column goes on from the row's last token, whichever side is padded.
            x = x.gather(1, last_real(keep)[..., None].expand(-1, -1, x.shape[-1]))
        if wanted:
            hidden_states.append(x)
        output = BaseModelOutputWithPast(x, state if use_cache else None, tuple(hidden_states) if wanted else None)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class TnllmForCausalLM(TnllmPreTrainedModel, GenerationMixin):
    """The model with a language-model head; logits are fp32."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TnllmConfig) -> None:
        super().__init__(config)
        self.model = TnllmModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = value

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TnllmState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Arguments as in TnllmModel, and those of the loss.

        labels [B, T] are shifted here, shift_labels [B, T] are not; -100 is ignored, and so is the first token after
        padding on the left. The loss is the mean of their cross entropies, or the sum over num_items_in_batch.
        logits_to_keep: the number of last columns whose logits are returned (0: all), or these columns; it does not change
        the loss.
        """
        # Not in the signature: Trainer computes a loss in evaluation only if all arguments with "label" in them are given.
        shift_labels = kwargs.pop("shift_labels", None)
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            return_dict=True, **kwargs,
        )  # fmt: skip
        hidden = output.last_hidden_state
        keep: slice | Tensor
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1:
            keep = logits_to_keep
        elif (count := int(logits_to_keep or 0)) >= 0:
            keep = slice(-count, None)
        else:
            raise ValueError(f"logits_to_keep is {count}; give the number of last columns, or 0 for all")
        if shift_labels is None and labels is not None:
            shift_labels = labels.roll(-1, 1)
            shift_labels[:, -1] = -100
        loss = None
        if shift_labels is None:
            logits = self._logits(hidden[:, keep])
        else:
            logits = self._logits(hidden)
            if attention_mask is not None:
                # No token can be predicted from the padding before a row's first one.
                before = attention_mask[:, -hidden.shape[1] :].cumsum(-1) == 0
                shift_labels = shift_labels.masked_fill(before.to(shift_labels.device), -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )  # fmt: skip
            logits = logits[:, keep]
        result = CausalLMOutputWithPast(loss, logits, _state_of(output), output.hidden_states)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: TnllmState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: TnllmState | None = None,
        position_ids: Tensor | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs for the columns that the state has not read yet; other keywords are passed on.

        `attention_mask` covers all columns, those that were read too; input_ids may be the new columns only.
        """
        state = own_state(past_key_values, cache)
        read = 0 if state is None else state.get_seq_length()
        given = 0 if inputs_embeds is None else inputs_embeds.shape[1]
        total = given + input_ids.shape[1]
        # A caller may give the ids of its embeddings too.
        for covers in (attention_mask, position_ids if given else None):
            if covers is not None:
                total = covers.shape[-1]
                break
        if is_first_iteration is None:
            is_first_iteration = cache_position is not None and int(cache_position[0]) == 0
        new = total - read
        if state is not None and not is_first_iteration:
            # While it decodes, the mask need not cover what was read: PEFT's prompts are not in it.
            new = next_sequence_length or max(new, 1)
        if new <= 0:
            begin = f"give at least one token, such as the begin token {self.config.bos_token_id}"
            if total == 0:
                raise ValueError(f"the prompt is empty; {begin}")
            raise ValueError(
                f"the prompt of {total} columns ends where past_key_values does, which read {read}; {begin}"
            )
        inputs: dict[str, Any] = {key: value for key, value in kwargs.items() if key not in NOT_FOR_THE_MODEL}
        if inputs_embeds is not None and read < given:
            # Embeddings are what is still to be read, and without a state the ids generated since.
            embeds = inputs_embeds[:, read:]
            if total > given:
                embeds = torch.cat([embeds, self.get_input_embeddings()(input_ids[:, given - total :])], dim=1)
            inputs["inputs_embeds"] = embeds
        else:
            inputs["input_ids"] = input_ids[:, -new:].contiguous()
        # A single new token is never padding, and reading its mask would synchronize the device.
        if new > 1 or read == 0:
            inputs["attention_mask"] = attention_mask
            mask = padding_mask(attention_mask, input_ids.shape[0], new)
            if position_ids is not None and position_ids.shape[-1] >= new:
                position_ids = position_ids[..., -new:]
                inputs["position_ids"] = position_ids if mask is None else continued_positions(position_ids, mask)
            if mask is not None and not bool(mask.any(-1).all()):
                row = int(mask.any(-1).logical_not().nonzero()[0])
                raise ValueError(f"row {row} of the batch is empty: give it one token, such as the begin token")
        return {**inputs, "past_key_values": state}

    def _get_initial_cache_position(self, *args: Any) -> dict[str, Any]:
        # transformers 4 looks into caches here; all that is needed is that later steps count up from 0. The dictionary
        # itself is changed: the caller in transformers 5.0 keeps its own.
        args[-1]["cache_position"] = torch.zeros(1, dtype=torch.int64, device=self.device)
        return args[-1]


class TnllmForSequenceClassification(TnllmPreTrainedModel):
    """The model with a linear classifier on each row's last token, whichever side is padded."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: TnllmConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TnllmModel(config)
        self.score = nn.Linear(config.model_dim, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TnllmState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Arguments as in TnllmModel; labels [B], or [B, num_labels] for several labels each → logits [B, num_labels].

        Without attention_mask, tokens at the ends of a row that equal config.pad_token_id are padding.
        """
        pad = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and past_key_values is None and pad is not None:
            real = input_ids != pad
            # Between real tokens the pad token is a token like any other. A row of nothing else is left as it is.
            before, after = real.cumsum(-1) > 0, real.flip(-1).cumsum(-1).flip(-1) > 0
            attention_mask = (before & after) | ~real.any(-1, keepdim=True)
        output = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            return_dict=True, **kwargs,
        )  # fmt: skip
        logits = self.score(output.last_hidden_state[:, -1])
        loss = None
        if labels is not None:
            more = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **more)
        result = SequenceClassifierOutputWithPast(loss, logits, _state_of(output), output.hidden_states)
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


def _state_of(output: BaseModelOutputWithPast) -> TnllmState | None:
    return output.cache if hasattr(output, "cache") else output.past_key_values
