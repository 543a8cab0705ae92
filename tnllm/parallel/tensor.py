"""Tensor parallelism: each rank holds a share of the heads of every mixer and of the channels of every GLU.

    shard_heads(model, rank, size, group)      # on the meta device, before weights are allocated

Split as in arXiv 2307.14995 Eq. 11-15: the first product of a mixer by output features, the last by input features, so that
a mixer costs one all-reduce in the forward pass (of its output) and one in the backward pass (of its input's gradient). The
paper leaves two things open: the norm over all heads needs the sum of squares across ranks (one number per token, forward
and backward), and embedding and output projection are split by vocabulary: rank r holds rows [r V / n, (r + 1) V / n). That
costs one sum of [tokens, M] in the forward pass of the one and in the backward pass of the other, and three numbers per
token for the softmax. No rank ever has the logits of the full vocabulary, nor those of all tokens.

Modules are unchanged; hooks add the all-reduces. `layout.TENSOR_PLAN` says which dim of which parameter is split.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm.kernels.linear_cross_entropy import chunked_cross_entropy, fake_forward, save_gradients, scale_gradients
from tnllm.modeling.attention import GatedLinearAttention
from tnllm.modeling.config import ModelConfig
from tnllm.modeling.model import LanguageModel
from tnllm.parallel.collectives import group_named, sum_backward, sum_both, sum_forward
from tnllm.parallel.layout import Layout


class HeadsNorm(nn.Module):
    """The norm over the channels of all heads, of which this rank holds `width / ranks`: same values as unsharded."""

    def __init__(self, config: ModelConfig, weight: nn.Parameter | None, group: str) -> None:
        super().__init__()
        self.kind, self.width, self.eps, self.group = config.norm, config.model_dim, config.norm_eps, group
        if weight is not None:
            self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., width / ranks] → the same shape and dtype; statistics in fp32 or wider."""
        return self._normalize(x, partial(sum_both, group=self.group), lambda weight: weight)

    def _normalize(self, x: Tensor, total: Callable[[Tensor], Tensor], full: Callable[[Tensor], Tensor]) -> Tensor:
        """`total` sums over ranks what is a sum of x's channels, `full` gives the weight of x's channels."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "layernorm":
            wide = wide - total(wide.sum(-1, keepdim=True)) / self.width
        mean_square = total(wide.square().sum(-1, keepdim=True)) / self.width
        y = (wide * (mean_square + self.eps).rsqrt()).to(x.dtype)
        return y if self.kind == "srmsnorm" else y * full(self.weight).to(x.dtype)


class OutputNorm(HeadsNorm):
    """The norm of a mixer's output [..., width], of which every rank has a summand, and a part of the norm's weight."""

    def __init__(self, config: ModelConfig, weight: nn.Parameter | None, group: str, rank: int, size: int) -> None:
        super().__init__(config, weight, group)
        width = self.width // size
        self.padding = (rank * width, (size - rank - 1) * width)

    def forward(self, x: Tensor) -> Tensor:
        """Summand → normalised sum, the same on every rank; so is its gradient, which each cuts its weight's part from."""
        total = sum_forward(x, self.group)
        return self._normalize(total, lambda own: own, lambda own: sum_forward(F.pad(own, self.padding), self.group))


def shard_heads(model: LanguageModel, rank: int, size: int, group: str) -> None:
    """Replace every parameter by this rank's shard (shapes only: the model is on the meta device), add the all-reduces."""
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        shape = Layout.of(name, tuple(parameter.shape), (rank, size)).shape
        local = nn.Parameter(parameter.new_empty(shape), requires_grad=parameter.requires_grad)
        setattr(owner, name.rpartition(".")[2], local)

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return sum_backward(inputs[0], group), *inputs[1:]

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return sum_forward(output[0], group), *output[1:]
        return sum_forward(output, group)

    for block in model.blocks:
        for mixer in (block.token_mixer, block.channel_mixer):
            mixer.register_forward_pre_hook(before)
        block.channel_mixer.register_forward_hook(after)
        if isinstance(block.token_mixer, GatedLinearAttention):
            mixer = block.token_mixer
            weight = getattr(mixer.norm, "weight", None)
            if model.config.norm_position == "output":
                mixer.norm = OutputNorm(model.config, weight, group, rank, size)
            else:
                mixer.norm = HeadsNorm(model.config, weight, group)
                mixer.register_forward_hook(after)
            heads = model.config.num_heads // size
            mixer.keep_heads(slice(rank * heads, (rank + 1) * heads))
        else:
            block.token_mixer.register_forward_hook(after)
    setattr(model, "embed_tokens", VocabularyEmbedding(model.get_parameter("embed_tokens.weight"), rank, group))  # noqa: B010
    model.cross_entropy = partial(vocabulary_cross_entropy, rank=rank, group=group)


_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class VocabularyEmbedding(nn.Module):
    """This rank's rows of an embedding; the other rows are looked up by their ranks, and the results summed."""

    def __init__(self, weight: nn.Parameter, rank: int, group: str) -> None:
        super().__init__()
        self.weight, self.rank, self.group = weight, rank, group

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] int64 of the full vocabulary → [..., M], the same on every rank."""
        rows = self.weight.shape[0]
        local = tokens - self.rank * rows
        ours = (local >= 0) & (local < rows)
        x = F.embedding(local.where(ours, 0), self.weight)
        return sum_forward(x * ours[..., None].to(x.dtype), self.group)


def vocabulary_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, *, rank: int, group: str
) -> Tensor:
    """Sum of cross entropies, as `linear_cross_entropy`, with this rank's rows of the output projection.

    x [N, M], the same on every rank of `group`; weight [V / n, M]; labels [N] int64 of the full vocabulary. Returns the
    full sum on every rank. The gradient of x is the full one, that of weight belongs to its rows.
    """
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _forward(x, weight, labels, ignore_index, need_grad, rank, group)[0]


@torch.library.custom_op("tnllm::vocabulary_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_grad: bool, rank: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in x and weight (empty unless `need_grad`)."""
    process_group = group_named(group)

    def reduce(values: Tensor, op: str) -> None:
        dist.all_reduce(values, op=_REDUCE_OPS[op], group=process_group)

    first_row = rank * weight.shape[0]
    loss, dx, dweight = chunked_cross_entropy(x, weight, labels, ignore_index, need_grad, first_row, reduce)
    if need_grad:
        # All chunks in one collective, in fp32, so that the contributions are not rounded before they are summed.
        total = dx.to(loss.dtype)
        reduce(total, "sum")
        dx = total.to(x.dtype)
    return loss, dx, dweight


_forward.register_fake(fake_forward)
_forward.register_autograd(scale_gradients, setup_context=save_gradients)
