"""Collectives inside a model: each is differentiable and opaque to torch.compile.

    y = sum_backward(x, group)     # y = x; the gradient is summed over the group
    y = sum_forward(x, group)      # x is summed over the group; the gradient passes unchanged
    y = sum_both(x, group)         # both are summed

`group` is the name of a process group (`group.group_name`): a string can be an argument of a custom operator. The first two
are the conjugate operators f and g of Megatron-LM (arXiv 1909.08053), around a product whose inner dim is sharded.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # groups by name, as torch's own operators do


def group_named(name: str) -> dist.ProcessGroup:
    return _resolve_process_group(name)  # type: ignore[arg-type]


@torch.library.custom_op("tnllm::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, group: str) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group_named(group))
    return total


@_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


class _Sum(torch.autograd.Function):
    """Sums x over the group in the passes that are named."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, in_forward: bool, in_backward: bool) -> Tensor:
        ctx.group = group if in_backward else None
        return _all_reduce(x, group) if in_forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] if ctx.group is None else _all_reduce(grads[0], ctx.group), None, None, None


def sum_backward(x: Tensor, group: str) -> Tensor:
    """x itself, if each rank computes a part of what follows: the gradients of the parts are summed."""
    return _Sum.apply(x, group, False, True)


def sum_forward(x: Tensor, group: str) -> Tensor:
    """The sum of x over ranks, if each rank then computes the same: each rank's x gets the full gradient."""
    return _Sum.apply(x, group, True, False)


def sum_both(x: Tensor, group: str) -> Tensor:
    """The sum of x over ranks, if each rank then computes a part of what follows."""
    return _Sum.apply(x, group, True, True)
