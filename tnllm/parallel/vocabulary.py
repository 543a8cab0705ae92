"""Embedding and head split by vocabulary: rank r holds rows [r V / n, (r + 1) V / n) of one matrix, tied or not.

    x = VocabularyEmbedding(weight, rank, group)(tokens)
    loss_sum = vocabulary_cross_entropy(x, weight, labels, rank=rank, group=group)

Exchanged: one sum of [tokens, M] in the embedding's forward and in the head's backward pass, and three numbers a token for
the softmax. Logits are never whole anywhere, nor held for more than a piece of the tokens.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tnllm.parallel.collectives import group_named, sum_forward

# Elements of fp32 logits held at a time, as in the head of one rank.
_HELD = {"cuda": 1 << 28}


class VocabularyEmbedding(nn.Module):
    """Rows of an embedding; tokens of other ranks' rows come from them."""

    def __init__(self, weight: nn.Parameter, rank: int, group: str) -> None:
        super().__init__()
        self.weight, self.rank, self.group = weight, rank, group

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] int64 of the whole vocabulary → [..., M], the same on every rank."""
        rows = self.weight.shape[0]
        local = tokens - self.rank * rows
        ours = (local >= 0) & (local < rows)
        found = F.embedding(local.where(ours, 0), self.weight)
        return sum_forward(found * ours[..., None].to(found.dtype), self.group)


def vocabulary_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100, *, rank: int, group: str
) -> Tensor:
    """Sum of cross entropies, as `linear_cross_entropy`, with this rank's rows of the head.

    x [N, M], the same on every rank of `group`; weight [V / n, M]; labels [N] int64 of the whole vocabulary. Returns
    the whole sum on every rank. The gradient of x is the whole one, that of weight belongs to its rows.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _forward(x, weight, labels, ignore_index, wanted, rank, group)[0]


@torch.library.custom_op("tnllm::vocabulary_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: bool, rank: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in x and weight (empty unless wanted)."""
    with torch.autocast(x.device.type, enabled=False):
        return _pieces(x, weight, labels, ignore_index, wanted, rank, group_named(group))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the accumulator's precision in the result."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _pieces(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: bool, rank: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    low = weight.to(x.dtype)
    loss = x.new_zeros((), dtype=wide)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide)) if wanted else weight.new_empty(0)
    step = max(1, _HELD.get(x.device.type, 1 << 22) // weight.shape[0])
    for start in range(0, x.shape[0], step):
        part, target = x[start : start + step], labels[start : start + step]
        counted = target != ignore_index
        local = target - rank * weight.shape[0]
        ours = counted & (local >= 0) & (local < weight.shape[0])
        local = local.where(ours, 0)[:, None]
        logits = _product(part, low.t())
        top = logits.amax(-1)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        logits -= top[:, None]
        picked = logits.gather(1, local)[:, 0] * ours
        sums = torch.stack([logits.exp_().sum(-1), picked])
        dist.all_reduce(sums, group=group)
        total, picked = sums
        loss += ((total.log() - picked) * counted).sum()
        if wanted:
            logits.mul_((counted / total)[:, None])
            logits.scatter_add_(1, local, -ours.to(logits.dtype)[:, None])
            dlogits = logits.to(x.dtype)
            torch.mm(dlogits, low, out=dx[start : start + step])
            dweight += _product(dlogits.t(), part)
    if wanted:
        # In one exchange, fp32 so that ranks' parts are not rounded before they are added.
        summed = dx.to(wide)
        dist.all_reduce(summed, group=group)
        dx = summed.to(x.dtype)
    return loss, dx, dweight.to(weight.dtype)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: bool, rank: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    if not wanted:
        return loss, x.new_empty(0), weight.new_empty(0)
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, dloss: Tensor, _dx: Tensor, _dweight: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    return dx * dloss.to(dx.dtype), dweight * dloss.to(dweight.dtype), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save)
