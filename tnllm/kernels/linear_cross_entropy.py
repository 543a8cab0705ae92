"""The head and its loss in one: summed cross entropy of x W^T without ever holding the logits.

    loss_sum = linear_cross_entropy(x, weight, labels)     # [N, M], [V, M], [N] → scalar

With a vocabulary of 64,000 the logits would be the largest tensor of a training step. Tokens are taken a chunk at a time;
when a gradient is wanted it is formed right there, while the chunk's logits exist, so the three matrix products of a
plain head are all there are: nothing is recomputed. The backward pass only scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of fp32 logits held at a time: 1 GiB on a GPU (4,000 rows of a 64,000 vocabulary: large matrix products and few
# sums into the weight's gradient), 16 MiB on CPU, where smaller stays in cache.
_HELD = {"cuda": 1 << 28, "cpu": 1 << 22}


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The definition, logits and all."""
    return F.cross_entropy(x @ weight.t(), labels, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum over tokens of -log softmax(x W^T)[label], in nats.

    x [N, M] floating; weight [V, M], of x's dtype or wider (an fp32 master weight then gets its gradient in fp32,
    while the products run in x's dtype); labels [N] int64, those equal to ignore_index count nothing.
    Returns an fp32 scalar (float64 for float64 inputs), exactly 0 when every label is ignored. Products accumulate
    in fp32. Differentiable (once) in x and weight. Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            "linear_cross_entropy needs x [N, M], weight [V, M], labels [N]; "
            f"got {list(x.shape)}, {list(weight.shape)}, {list(labels.shape)}"
        )
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _forward(x, weight, labels, ignore_index, wanted)[0]


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with the accumulator's precision in the result."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(_wide_dtype(a))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in one pass over `total` where it is as wide as the accumulator."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += _product(a, b)


@torch.library.custom_op("tnllm::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients in x and weight (empty unless wanted)."""
    # Inside an autocast region the products below would be cast behind our back; the dtypes here are the caller's.
    with torch.autocast(x.device.type, enabled=False):
        return _chunks(x, weight, labels, ignore_index, wanted)


def _chunks(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide_dtype(x)
    low = weight.to(x.dtype)
    loss = x.new_zeros((), dtype=wide)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, wide)) if wanted else weight.new_empty(0)
    rows = max(1, _HELD.get(x.device.type, 1 << 22) // weight.shape[0])
    for start in range(0, x.shape[0], rows):
        part, target = x[start : start + rows], labels[start : start + rows]
        logits = _product(part, low.t())
        if x.is_cuda:
            from tnllm.kernels.linear_cross_entropy_triton import launch_softmax

            losses, dlogits = launch_softmax(logits, target, ignore_index, wanted, x.dtype)
        else:
            losses, dlogits = _softmax(logits, target, ignore_index, wanted, x.dtype)
        loss += losses.sum()
        if wanted:
            torch.mm(dlogits, low, out=dx[start : start + rows])
            _add_product(dweight, dlogits.t(), part)
    return loss, dx, dweight.to(weight.dtype)


def _softmax(
    logits: Tensor, target: Tensor, ignore_index: int, wanted: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and the logits' gradient in `dtype` (where wanted); `logits` is overwritten."""
    counted = (target != ignore_index)[:, None]
    # An ignored label points nowhere; it is read as class 0 and weighs nothing.
    target = target[:, None].where(counted, 0)
    logits -= logits.amax(-1, keepdim=True)
    picked = logits.gather(1, target)
    total = logits.exp_().sum(-1, keepdim=True)
    losses = (total.log() - picked) * counted
    if wanted:
        logits.mul_(counted / total)
        logits.scatter_add_(1, target, -counted.to(logits.dtype))
    return losses, logits.to(dtype)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=_wide_dtype(x))
    if not wanted:
        return loss, x.new_empty(0), weight.new_empty(0)
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, dloss: Tensor, _dx: Tensor, _dweight: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = ctx.saved_tensors
    return dx * dloss.to(dx.dtype), dweight * dloss.to(dweight.dtype), None, None, None


_forward.register_autograd(_autograd, setup_context=_save)
