"""Bytes that this rank sends, counted from the collectives that are actually called.

    with Traffic() as traffic:
        ...                                  # steps
    traffic.by_axis(mesh)                    # {"weights": bytes, "sequence": ..., "tensor": ..., "other": ...}

With n ranks a ring sends (n - 1) / n of the full tensor from each rank for an all-gather or a reduce-scatter, and twice
that for an all-reduce. This is a lower bound; the algorithm that NCCL picks may send more.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tnllm.parallel.mesh import Mesh

# Operator of torch.distributed → which argument is the full tensor, and how often a ring sends (n - 1) / n of it.
_COLLECTIVES = {
    "c10d::allreduce_": (0, 2),
    "c10d::allgather_": (0, 1),
    "c10d::_allgather_base_": (0, 1),
    "c10d::_reduce_scatter_base_": (1, 1),
}
_DISPATCH_KEYS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}

# "weights" is shard and sequence together.
TRAFFIC_AXES = ("weights", "replicate", "sequence", "tensor", "other")


class Traffic(TorchDispatchMode):
    """Counts while it is entered, and slows every operator down: do not time under it.

    `sent` maps the name of a process group to bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then calls operators on local tensors
        if func.namespace == "tnllm":
            # A mode is off while it handles an operator, so collectives inside a custom operator would not be seen. Enter
            # it again, and go to the device's kernel directly, because `func(...)` would come back here.
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            with self:
                return func.redispatch(torch._C.DispatchKeySet(_DISPATCH_KEYS[device]), *args, **kwargs)
        if func._schema.name in _COLLECTIVES:
            self._count(func._schema.name, args)
        return func(*args, **kwargs)

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        index, rounds = _COLLECTIVES[name]
        group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
        nbytes = sum(tensor.nbytes for tensor in torch.utils._pytree.tree_leaves(args[index]))
        self.sent[group.group_name] += rounds * nbytes * (group.size() - 1) / group.size()

    def by_axis(self, mesh: Mesh) -> dict[str, float]:
        """Bytes so far by axis; "other" are the loss, norms and counts, which are reduced over several axes."""
        names, sums = axis_names(mesh), dict.fromkeys(TRAFFIC_AXES, 0.0)
        for group, nbytes in self.sent.items():
            sums[names.get(group, "other")] += nbytes
        return sums


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Name of a process group → its axis, one of `TRAFFIC_AXES`."""
    names = {str(mesh.groups[axis].group_name): axis for axis in ("sequence", "tensor")}
    if mesh.fsdp is not None:
        names |= {str(mesh.fsdp.get_group(axis).group_name): axis for axis in mesh.fsdp.mesh_dim_names or ()}
    return names
