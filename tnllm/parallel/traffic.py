"""Bytes that this rank sends, counted from the collectives that are really called.

    with Traffic() as traffic:
        ...                                  # steps
    traffic.by_axis(mesh)                    # {"weights": bytes, "sequence": ..., "tensor": ..., "other": ...}

With n ranks a ring sends (n - 1) / n of a tensor from each rank to gather or to scatter it, and twice that to sum it.
Which algorithm a library picks is its own business; this is the least that any has to send.
"""

from collections import defaultdict
from types import TracebackType
from typing import Any

import torch.distributed as dist

from tnllm.parallel.mesh import Mesh

# Collective → which argument is the whole tensor, its name, and how often a ring sends (n - 1) / n of it. Some names
# are those of older versions of torch.
COLLECTIVES = {
    "all_reduce": (0, "tensor", 2),
    "all_gather": (0, "tensor_list", 1),
    "all_gather_single": (0, "output_tensor", 1),
    "all_gather_into_tensor": (0, "output_tensor", 1),
    "reduce_scatter_single": (1, "input", 1),
    "reduce_scatter_tensor": (1, "input", 1),
}


class Traffic:
    """Counts while it is entered; `sent` maps the name of a process group to bytes."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = defaultdict(float)
        self._true: dict[str, Any] = {}
        self._inside = False

    def __enter__(self) -> "Traffic":
        for name in COLLECTIVES:
            if hasattr(dist, name):
                self._true[name] = getattr(dist, name)
                setattr(dist, name, self._counting(name))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, call in self._true.items():
            setattr(dist, name, call)

    def _counting(self, name: str) -> Any:
        call, (place, key, rounds) = self._true[name], COLLECTIVES[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            # One collective may be made of another: only the outer call counts.
            if self._inside:
                return call(*args, **kwargs)
            whole = kwargs[key] if key in kwargs else args[place]
            group = kwargs.get("group") or next((arg for arg in args if isinstance(arg, dist.ProcessGroup)), None)
            group = group or dist.distributed_c10d._get_default_group()
            nbytes = sum(t.nbytes for t in whole) if isinstance(whole, list) else whole.nbytes
            self.sent[group.group_name] += rounds * nbytes * (group.size() - 1) / group.size()
            self._inside = True
            try:
                return call(*args, **kwargs)
            finally:
                self._inside = False

        return counted

    def by_axis(self, mesh: Mesh) -> dict[str, float]:
        """Bytes so far by axis; "other" are the loss, norms and counts, which travel over several axes."""
        names, found = axis_names(mesh), dict.fromkeys((*TRAFFIC_AXES,), 0.0)
        for group, nbytes in self.sent.items():
            found[names.get(group, "other")] += nbytes
        return found


# "weights" is shard and sequence together.
TRAFFIC_AXES = ("weights", "replicate", "sequence", "tensor", "other")


def axis_names(mesh: Mesh) -> dict[str, str]:
    """Name of a process group → the axis of `TRAFFIC_AXES` it serves."""
    found = {str(mesh.groups[axis].group_name): axis for axis in ("sequence", "tensor")}
    if mesh.fsdp is not None:
        names = mesh.fsdp.mesh_dim_names or ()
        found |= {str(mesh.fsdp.get_group(name).group_name): name for name in names}
    return found
