"""One decoding step as a CUDA graph: a single launch instead of hundreds, which is what a small batch waits for.

step = CapturedStep(model, state)
logits = step(tokens)          # as model.step(tokens, state); logits are overwritten by the next call
logits = step(step.top_token)  # greedy decoding of one row: the argmax is part of the graph, nothing is copied

The graph of one row holds one persistent kernel (`kernels/decode_step/narrow.py` for small models, `decode.py` for large
ones), that of many the model's own kernels.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tnllm.modeling.model import LanguageModel
from tnllm.modeling.state import State

if TYPE_CHECKING:
    from tnllm.kernels.decode_step.narrow import RowDecodeStep
    from tnllm.kernels.decode_step.wide import DecodeStep

# Capturing costs about as much as four plain steps (385M on an H100: 88 ms; 24 ms a plain step, 1.3 ms a replay).
MIN_STEPS = 8


def can_capture(model: LanguageModel, num_steps: int) -> bool:
    """Whether capturing is possible and pays off for `num_steps` steps.

    A graph replays fixed addresses: a state of constant size has them, a growing key-value cache has not, and learned
    positions need a look at the host.
    """
    config = model.config
    fixed = config.kind == "transnormer" and config.position != "ape"
    return model.device.type == "cuda" and fixed and num_steps >= MIN_STEPS


def persistent_step(
    model: LanguageModel, state: State, num_choices: int | None = None
) -> "DecodeStep | RowDecodeStep | None":
    """The whole step as one kernel on `state`, or None where the batch is large or the model not of the released form.

    After it `tokens` [B] and `top` [B] are the likeliest of the first `num_choices` tokens (None: of all) and its logit.
    """
    from tnllm.kernels.decode_step.narrow import RowDecodeStep, fits
    from tnllm.kernels.decode_step.wide import MAX_BATCH, DecodeStep, Layer

    config = model.config
    released = (
        state.batch <= MAX_BATCH
        and (config.kind, config.gate, config.norm) == ("transnormer", "full", "srmsnorm")
        and config.position != "ape"
        and config.activation in ("silu", "none")
        and config.head_dim % 8 == 0
    )
    layers: list[Layer] = []
    mixers: list[Any] = [block.token_mixer for block in model.blocks]
    block: Any  # its parts are of the classes `released` stands for
    for block, memory in zip(model.blocks, state.layers, strict=True) if released else ():
        mixer, channel = block.token_mixer, block.channel_mixer
        linears = (mixer.qkvu_proj, mixer.out_proj, channel.l1, channel.l2, channel.l3)
        # A wrapped projection (an adapter, say) computes something else.
        if not all(type(linear) is nn.Linear and linear.weight.is_contiguous() for linear in linears):
            return None
        theta = None if mixer.lrpe is None else mixer.lrpe.theta.data
        qkvu, out, up, gate, down = (linear.weight.data for linear in linears)
        layers.append(Layer(qkvu, out, up, gate, down, memory, theta))
    if not layers or model.embed_tokens.weight.dtype == torch.float64:
        return None
    small = state.batch == 1 and fits(config.model_dim, model.embed_tokens.weight.element_size())
    return (RowDecodeStep if small else DecodeStep)(
        layers,
        model.embed_tokens.weight.data,
        model.head_weight.data,
        torch.stack([mixer.log_decay for mixer in mixers]),
        state.position,
        math.sqrt(config.model_dim) if config.scale_embedding else 1.0,
        config.norm_eps,
        (config.activation == "silu", config.value_activation == "silu", config.glu_activation == "silu"),
        config.vocab_size if num_choices is None else min(num_choices, config.vocab_size),
    )


class CapturedStep:
    """`model.step` for the tensors of one `state`, which it updates in place."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, state: State, num_choices: int | None = None) -> None:
        """`num_choices`: `top_token` is below this id; None: the full vocabulary."""
        self._tokens = torch.zeros(state.batch, dtype=torch.int64, device=model.device)
        # Kernels are compiled and workspaces allocated on a copy, on a stream of its own: neither may happen
        # during capture.
        copy, stream = state.clone(), torch.cuda.Stream()
        self._persistent = persistent_step(model, state, num_choices)
        rehearsal = persistent_step(model, copy, num_choices)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                rehearsal() if rehearsal else model.step(self._tokens, copy)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            if self._persistent:
                self._persistent()
                self._tokens, self.logits = self._persistent.tokens, self._persistent.logits
            else:
                self.logits = model.step(self._tokens, state)

    @property
    def top_token(self) -> Tensor | None:
        """[B] argmax of each row of the last logits, valid until the next call; None if the graph does not compute it."""
        return self._tokens if self._persistent else None

    @property
    def top_logit(self) -> Tensor:
        """[B] fp32, the logit of `top_token`."""
        assert self._persistent
        return self._persistent.top

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] int64 → logits [B, V] fp32, valid until the next call."""
        if tokens is not self._tokens:
            self._tokens.copy_(tokens)
        self._graph.replay()
        return self.logits
