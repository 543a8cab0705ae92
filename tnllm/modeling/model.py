"""The language model: TransNormerLLM, hybrids of it and, behind the same interface, the softmax baseline.

    model = build_model(get_preset("385m"), device="cuda", dtype=torch.bfloat16, seed=0)
    logits, state = model(tokens)                # tokens [B, T] int64 → logits [B, T, V] fp32
    logits, state = model(more, state)           # continues; the state passed in is not changed
    logits = model.step(last, state)             # decoding: one token per row, `state` updated in place
    loss_sum = model.loss(tokens, labels)        # training: summed cross entropy, never holding the full logits

Paper: arXiv 2307.14995 Eq. 9 (block), arXiv 2405.17381 Fig. 3.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnllm.errors import UserError
from tnllm.kernels.linear_cross_entropy import linear_cross_entropy
from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.checkpointing import MODES, checkpoint_selectively
from tnllm.modeling.config import LoraConfig, ModelConfig
from tnllm.modeling.int8 import Int8Embedding, Int8Linear
from tnllm.modeling.layers import LRPE, ResidualBlock, make_norm
from tnllm.modeling.packing import packed_index
from tnllm.modeling.state import State
from tnllm.modeling.transformer import SoftmaxAttention, make_mixer


class Block(ResidualBlock):
    """A residual block that may decode in place, and recompute activations in its backward pass."""

    token_mixer: GatedLinearAttention | SoftmaxAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, make_mixer(config, layer))
        self.selective = False  # selective activation checkpointing: save the results of matrix products only

    def forward(
        self, x: Tensor, positions: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, longest: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, M] → x [B, T, M], and the layer's new state."""
        if self.selective and state is None and torch.is_grad_enabled():
            args = (x, positions, cu_seqlens, longest)
            return checkpoint_selectively(self._mix_without_state, self.num_products, *args), None
        return super().forward(x, positions, state, cu_seqlens, longest)

    @property
    def num_products(self) -> int:
        """Matrix products in a training forward pass."""
        return sum(isinstance(module, nn.Linear) for module in self.modules()) - self.channel_mixer.fuses_up_projections

    def _mix_without_state(
        self, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, longest: int | None
    ) -> Tensor:
        return super().forward(x, positions, None, cu_seqlens, longest)[0]

    def step(self, x: Tensor, positions: Tensor, state: Tensor) -> Tensor:
        """x [B, M] → x [B, M]; `state` is updated in place."""
        x = x + self.token_mixer.step(self.token_norm(x), positions, state)
        return x + self.channel_mixer(self.channel_norm(x))


def compile_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which runs a Block, compiled.

    It has a form for each kind of layer, with and without gradients, for fixed and for varying lengths: a hybrid has more
    than the eight that torch allows a function before it gives up.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True)


def _without_state(
    block: Block, x: Tensor, positions: Tensor, cu_seqlens: Tensor | None, longest: int | None
) -> Tensor:
    return block(x, positions, None, cu_seqlens, longest)[0]


class LanguageModel(nn.Module):
    """Embedding, blocks, final norm, head. Every choice is in `config`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.model_dim)
        if config.position == "ape":
            self.embed_positions = nn.Embedding(config.max_position, config.model_dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config, config.model_dim)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.checkpointing = "none"
        self._block: Callable[[Block, Tensor, Tensor, Tensor | None, int | None], Tensor] = _without_state
        self.lora: LoraConfig | None = None  # set while adapters are attached (tnllm.modeling.lora)
        # Head and loss in one; replaced under vocabulary parallelism.
        self.cross_entropy = linear_cross_entropy

    @property
    def head_weight(self) -> Tensor:
        """[V, M]: the embedding when tied."""
        return self.head.weight  # type: ignore[return-value]

    @property
    def head(self) -> nn.Module:
        """The module whose `weight` is `head_weight`."""
        return self.embed_tokens if self.config.tie_embeddings else self.lm_head

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: that of the matrices, float32 where these are in int8."""
        return torch.float32 if self.is_int8 else self.head_weight.dtype

    @property
    def dtype_name(self) -> str:
        """Of the matrices: float32, bfloat16, float64 or int8."""
        return "int8" if self.is_int8 else str(self.dtype).removeprefix("torch.")

    @property
    def is_int8(self) -> bool:
        """Whether the matrices are in int8."""
        return isinstance(self.embed_tokens, Int8Linear)

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained; a tied head counts once."""
        quantized = sum(module.shape.numel() for module in self.modules() if isinstance(module, Int8Linear))
        return quantized + sum(parameter.numel() for parameter in self.parameters())

    @property
    def blocks(self) -> list[Block]:
        """`layers` as a typed list."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        table = self.embed_tokens
        return (table.scale if isinstance(table, Int8Linear) else table.weight).device

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Matrices and embeddings N(0, init_std^2), the padding row zero, norm weights one, LRPE's theta by its formula."""
        for module in self.modules():
            self.init_module(module, generator)

    def init_module(self, module: nn.Module, generator: torch.Generator | None = None) -> None:
        """Initialise one module of this model, without its children."""
        with torch.no_grad():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.init_std, generator=generator)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, LRPE):
                module.reset()
            if module is self.embed_tokens and self.config.pad_token_id is not None:
                module.weight[self.config.pad_token_id].zero_()

    def set_activation_checkpointing(self, mode: str) -> None:
        """What the backward pass recomputes: `none`; `full`: every block; `selective`: all but matrix products."""
        if mode not in MODES:
            raise UserError(f"activation checkpointing is {mode!r}; allowed: {', '.join(MODES)}")
        self.checkpointing = mode
        for block in self.blocks:
            block.selective = mode == "selective"

    def compile_blocks(self) -> None:
        """Use torch.compile for what `loss` runs, block by block.

        Layers of one form share a compilation, so it takes seconds. `torch.compile(model.loss, fullgraph=True)` works too:
        it takes a minute and is not measurably faster.
        """
        self._block = compile_block(_without_state)

    @torch.no_grad()
    def quantize_int8(self) -> None:
        """Replace every matrix by its int8 form, for inference on a CPU. On the meta device nothing is rounded."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) or child is self.embed_tokens:
                    kind = Int8Linear if isinstance(child, nn.Linear) else Int8Embedding
                    quantized = kind(child.weight.shape, child.weight.device)
                    setattr(module, name, quantized if child.weight.is_meta else quantized.copy_(child.weight))

    @torch.no_grad()
    def dequantize(self) -> None:
        """Undo `quantize_int8`: every matrix in float32, with the rounded values."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Int8Linear):
                    rows, columns = child.shape
                    plain: nn.Module = nn.Linear(columns, rows, bias=False, device="meta")
                    if isinstance(child, Int8Embedding):
                        plain = nn.Embedding(rows, columns, device="meta")
                    plain.weight = nn.Parameter(child.dequantized().contiguous(), requires_grad=False)
                    setattr(module, name, plain)

    def init_state(self, batch: int, device: torch.device | str | None = None) -> State:
        """The state before any token, for `batch` rows."""
        device = torch.device(device) if device is not None else self.device
        layers = [block.token_mixer.new_state(batch, device, self.dtype) for block in self.blocks]
        return State(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.model_dim)
        if self.config.position == "ape":
            x = x + self.embed_positions(positions)
        # Under autocast the residual stream is in low precision too: half the memory traffic between blocks.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _run(
        self,
        tokens: Tensor,
        layers: list[Tensor] | list[None],
        start: Tensor | None,
        cu_seqlens: Tensor | None,
        longest: int | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Blocks and final norm. `start` [rows] is the position of each row's first token; None means zero."""
        batch, length = tokens.shape
        if cu_seqlens is None:
            positions = torch.arange(length, device=tokens.device).expand(batch, length)
            if start is not None:
                positions = positions + start[:, None]
        else:
            sequence, offset = packed_index(cu_seqlens, length)
            positions = (offset if start is None else offset + start[sequence])[None]
        x = self._embed(tokens, positions)
        new_layers: list[Tensor | None] = []
        for block, layer in zip(self.blocks, layers, strict=True):
            new: Tensor | None = None
            if layer is not None:
                x, new = block(x, positions, layer, cu_seqlens)
            elif self.checkpointing == "full" and torch.is_grad_enabled():
                x = checkpoint(self._block, block, x, positions, cu_seqlens, longest, use_reentrant=False)
            else:
                x = self._block(block, x, positions, cu_seqlens, longest)
            new_layers.append(new)
        return self.final_norm(x), new_layers

    def hidden(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Final-norm output [B, T, M] in the model's dtype, and the state after the last token.

        tokens [B, T] int64; or [1, total] with cu_seqlens [N + 1] int32, and a state of N rows. The state passed
        in is not changed.
        """
        rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is None:
            state = self.init_state(rows)
        lengths = tokens.shape[1] if cu_seqlens is None else cu_seqlens.diff().long()
        self._check_length(state.position + lengths)
        x, layers = self._run(tokens, state.layers, state.position, cu_seqlens)
        return x, State(layers, state.position + lengths)  # type: ignore[arg-type]

    def _check_length(self, end: Tensor) -> None:
        """Only learned absolute positions bound the length."""
        if self.config.position == "ape" and int(end.max()) > self.config.max_position:
            raise UserError(
                f"{int(end.max())} tokens exceed model.max_position {self.config.max_position}, the learned "
                "positions of position=ape; shorten the text or raise model.max_position before training"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., M] → [..., V] fp32."""
        head = self.head
        if isinstance(head, Int8Linear):
            return head.product(hidden)
        weight = self.head_weight
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            # The fp32 accumulator is stored as it is, not rounded to 16 bits.
            flat = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return flat.unflatten(0, hidden.shape[:-1])
        return F.linear(hidden, weight).float() if hidden.dtype != torch.float64 else F.linear(hidden, weight)

    def forward(
        self, tokens: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """tokens [B, T] int64 → logits [B, T, V] fp32 and the new state; see `hidden` for packing."""
        hidden, state = self.hidden(tokens, state, cu_seqlens)
        return self.logits(hidden), state

    def step(self, tokens: Tensor, state: State) -> Tensor:
        """One token for each row: tokens [B] int64 → logits [B, V] fp32. `state` is updated in place."""
        state.reserve()
        self._check_length(state.position + 1)
        x = self._embed(tokens, state.position)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block.step(x, state.position, layer)
        state.position += 1
        return self.logits(self.final_norm(x))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        start: Tensor | None = None,
        longest: int | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Sum of cross entropies (nats, fp32 scalar) over the labels that are not -100; `labels` has the shape of `tokens`.

        `start` [B] int64 is the position of each row's first token; None means zero. No packed sequence has more than
        `longest` tokens: softmax attention is faster where it knows the bound. `counted` [N] int64: where the flattened
        labels are not -100; the head then computes no other.
        """
        layers: list[None] = [None] * self.config.num_layers
        x, _ = self._run(tokens, layers, start, cu_seqlens, longest)
        x, labels = x.flatten(0, 1), labels.flatten()
        if counted is not None:
            x, labels = x.index_select(0, counted), labels.index_select(0, counted)
        return self.cross_entropy(x, self.head_weight, labels)

    def correct(self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """[N] bool: which of the N labels that are not -100, in order, are the most likely token; shapes as in `loss`."""
        layers: list[None] = [None] * self.config.num_layers
        x, _ = self._run(tokens, layers, None, cu_seqlens)
        counted = labels != -100
        return self.logits(x[counted]).argmax(-1) == labels[counted]


def build_model(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int | None = None
) -> LanguageModel:
    """Build a model with initialised weights; on the meta device nothing is allocated.

    Parameters are in `dtype`, except LRPE's theta, which is never below fp32. On one device type a seed always gives the
    same weights. torch.int8 rounds those of float32.
    """
    with torch.device("meta"):
        model = LanguageModel(config).to(torch.float32 if dtype == torch.int8 else dtype)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    model.init_weights(None if seed is None else torch.Generator(device=device).manual_seed(seed))
    if dtype == torch.int8:
        model.quantize_int8()
    return model
