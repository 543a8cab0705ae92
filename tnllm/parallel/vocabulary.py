"""Embedding and output projection sharded by vocabulary: rank r holds rows [r V / n, (r + 1) V / n) of the matrix.

    x = VocabularyEmbedding(weight, rank, group)(tokens)
    loss_sum = vocabulary_cross_entropy(x, weight, labels, rank=rank, group=group)

Communicated: one sum of [tokens, M] in the forward pass of the embedding and in the backward pass of the projection, and
three numbers per token for the softmax. No rank ever has the logits of the full vocabulary, nor those of all tokens.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm.kernels.linear_cross_entropy import chunked_cross_entropy, fake_forward, save_gradients, scale_gradients
from tnllm.parallel.collectives import group_named, sum_forward

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
