"""The output projection and its loss in one: the summed cross entropy of x W^T, without materialising all logits.

    loss_sum = linear_cross_entropy(x, weight, labels)     # [N, M], [V, M], [N] → scalar

With a vocabulary of 64,000 the logits would be the largest tensor of a training step. So tokens are processed in chunks. If
a gradient is needed it is computed at once, while the chunk's logits are there: three matrix products in all, as without
chunks, and nothing is recomputed. The backward pass only scales.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# fp32 logits per chunk: 1 GiB on a GPU (4,000 rows of a 64,000 vocabulary: large matrix products, and few additions to the
# weight's gradient), 16 MiB on CPU, where they stay in cache.
_CHUNK_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 22}

# Reduces a tensor over ranks in place; the second argument is "sum" or "max".
Reduce = Callable[[Tensor, str], None]


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The definition."""
    return F.cross_entropy(x @ weight.t(), labels, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum over tokens of -log softmax(x W^T)[label], in nats.

    x [N, M] floating; weight [V, M], of x's dtype or wider (an fp32 master weight then gets its gradient in fp32,
    while the products run in x's dtype); labels [N] int64; those equal to ignore_index are not counted.
    Returns an fp32 scalar (float64 for float64 inputs), exactly 0 when every label is ignored. Products accumulate
    in fp32. Differentiable (once) in x and weight. Raises ValueError for shapes and dtypes that do not fit, and for
    labels that are no row of weight; on CUDA labels are trusted, since checking them synchronises.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            "linear_cross_entropy needs x [N, M], weight [V, M], labels [N]; "
            f"got {list(x.shape)}, {list(weight.shape)}, {list(labels.shape)}"
        )
    if labels.dtype != torch.int64 or not x.is_floating_point():
        raise ValueError(f"linear_cross_entropy needs floating x and int64 labels; got {x.dtype}, {labels.dtype}")
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _forward(x, weight, labels, ignore_index, need_grad)[0]


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the accumulator's precision in the result."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(_wide_dtype(a))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one pass over `total` if it is as wide as the accumulator."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _product(a, b)


@torch.library.custom_op("tnllm::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.is_cuda:
        bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= weight.shape[0]))]
        if len(bad):
            raise ValueError(
                f"labels must be {ignore_index} or from 0 to {weight.shape[0] - 1}, the rows of weight; got {int(bad[0])}"
            )
    return chunked_cross_entropy(x, weight, labels, ignore_index, need_grad)


def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    need_grad: bool,
    first_row: int = 0,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in x and weight (empty unless `need_grad`).

    With `reduce`, weight [V / n, M] holds the rows from `first_row` of a vocabulary that is sharded over n ranks. Then the
    loss is the full one, and the gradient of x this rank's contribution to it.
    """
    wide = _wide_dtype(x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_grad else x.new_empty(0)
    dtype = torch.promote_types(weight.dtype, wide)
    dweight = torch.zeros_like(weight, dtype=dtype) if need_grad else weight.new_empty(0)
    loss = x.new_zeros((), dtype=wide)
    rows = max(1, _CHUNK_LOGITS.get(x.device.type, 1 << 22) // weight.shape[0])
    # An autocast region of the caller must not cast the operands of the products below.
    with torch.autocast(x.device.type, enabled=False):
        low = weight.to(x.dtype)
        for start in range(0, x.shape[0], rows):
            part, target = x[start : start + rows], labels[start : start + rows]
            logits = _product(part, low.t())
            if x.is_cuda and reduce is None:
                from tnllm.kernels.linear_cross_entropy_triton import launch_softmax

                losses, dlogits = launch_softmax(logits, target, ignore_index, need_grad, x.dtype)
            else:
                losses, dlogits = _softmax(logits, target, ignore_index, need_grad, x.dtype, first_row, reduce)
            loss += losses.sum()
            if need_grad:
                torch.mm(dlogits, low, out=dx[start : start + rows])
                _add_product(dweight, dlogits.t(), part)
    return loss, dx, dweight.to(weight.dtype)


def _softmax(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    need_grad: bool,
    dtype: torch.dtype,
    first_row: int,
    reduce: Reduce | None,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and the gradient of the logits in `dtype` (if needed); `logits` is overwritten."""
    counted = target != ignore_index
    # Labels whose logit is in this shard. The others are read as class 0, with weight 0.
    ours, target = counted, target - first_row
    if reduce is not None:
        ours = counted & (target >= 0) & (target < logits.shape[1])
    target = target.where(ours, 0)[:, None]
    top = logits.amax(-1)
    if reduce is not None:
        reduce(top, "max")
    logits -= top[:, None]
    picked = logits.gather(1, target)[:, 0] * ours
    total = logits.exp_().sum(-1)
    if reduce is not None:
        sums = torch.stack([total, picked])
        reduce(sums, "sum")
        total, picked = sums
    losses = (total.log() - picked) * counted
    if need_grad:
        logits.mul_((counted / total)[:, None])
        logits.scatter_add_(1, target, -ours.to(logits.dtype)[:, None])
    return losses, logits.to(dtype)


# The three functions below serve the vocabulary-parallel operator too, which has more arguments.
@_forward.register_fake
def fake_forward(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, need_grad: bool, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=_wide_dtype(x))
    if not need_grad:
        return loss, x.new_empty(0), weight.new_empty(0)
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape)


def save_gradients(ctx, inputs, output) -> None:
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def scale_gradients(ctx, dloss: Tensor, _dx: Tensor, _dweight: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    return dx * dloss.to(dx.dtype), dweight * dloss.to(dweight.dtype), *[None] * (ctx.num_inputs - 2)


_forward.register_autograd(scale_gradients, setup_context=save_gradients)
