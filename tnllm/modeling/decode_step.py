"""The whole decode step of a model as one persistent kernel, where `tnllm.kernels.decode_step` has one for it.

step = persistent_step(model, state)   # None if the model or the batch is of another form
step.tokens.copy_(tokens)              # [B] int64
step()                                 # step.logits [B, V] fp32; `state` is updated in place; step.tokens is the argmax
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tnllm.modeling.model import LanguageModel
from tnllm.modeling.state import State

if TYPE_CHECKING:
    from tnllm.kernels.decode_step.narrow import NarrowDecodeStep
    from tnllm.kernels.decode_step.wide import WideDecodeStep


def persistent_step(
    model: LanguageModel,
    state: State,
    num_choices: int | None = None,
    max_batch: int | None = None,
    narrow: bool = True,
) -> "NarrowDecodeStep | WideDecodeStep | None":
    """A callable that decodes one token per row of `state`, or None if the kernels do not cover this model or batch.

    num_choices: the argmax in `tokens` and `top_logit` is taken over the ids below it (None: all). max_batch: the largest
    batch to accept (None: up to where the kernel is the faster way). narrow: whether small models use the narrow kernel.
    """
    # Triton is not installed everywhere.
    from tnllm.kernels.decode_step.common import DecodeModel, Layer
    from tnllm.kernels.decode_step.narrow import NarrowDecodeStep, fits
    from tnllm.kernels.decode_step.wide import MAX_BATCH, WideDecodeStep

    config = model.config
    released = (
        state.batch <= (MAX_BATCH if max_batch is None else max_batch)
        and (config.kind, config.gate, config.norm) == ("transnormer", "full", "srmsnorm")
        and config.norm_position == "attention"
        and not config.num_softmax
        and config.position != "ape"
        and config.activation in ("silu", "none")
        and config.head_dim % 8 == 0
        and model.embed_tokens.weight.dtype != torch.float64
    )
    if not released:
        return None
    layers: list[Layer] = []
    block: Any  # the types of its parts follow from `released`
    for block, layer_state in zip(model.blocks, state.layers, strict=True):
        mixer, channel = block.token_mixer, block.channel_mixer
        linears = (mixer.qkvu_proj, mixer.out_proj, channel.l1, channel.l2, channel.l3)
        # A wrapped projection (LoRA, for example) computes something else.
        if not all(type(linear) is nn.Linear and linear.weight.is_contiguous() for linear in linears):
            return None
        theta = None if mixer.lrpe is None else mixer.lrpe.theta.data
        qkvu, out, up, gate, down = (linear.weight.data for linear in linears)
        layers.append(Layer(qkvu, out, up, gate, down, layer_state, theta))
    mixers: list[Any] = [block.token_mixer for block in model.blocks]
    inputs = DecodeModel(
        layers,
        embedding=model.embed_tokens.weight.data,
        head=model.head_weight.data,
        log_decay=torch.stack([mixer.log_decay for mixer in mixers]),
        position=state.position,
        scale=math.sqrt(config.model_dim) if config.scale_embedding else 1.0,
        eps=config.norm_eps,
        silu=(config.activation == "silu", config.value_activation == "silu", config.glu_activation == "silu"),
        num_choices=config.vocab_size if num_choices is None else min(num_choices, config.vocab_size),
    )
    small = narrow and state.batch == 1 and fits(config.model_dim, inputs.head.element_size())
    return NarrowDecodeStep(inputs) if small else WideDecodeStep(inputs)
