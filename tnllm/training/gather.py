"""Full tensors from the shards of a mesh, each on the one rank that owns it.

owned = gather_full({"model": {"embed_tokens.weight": (local, layout)}}, mesh)    # every rank makes the same call
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tnllm.parallel.layout import Layout
from tnllm.parallel.mesh import Mesh

# A tensor on this rank and its layout; None: complete, and equal on every rank.
Local = tuple[Tensor, Layout | None]


def gather_full(tensors: dict[str, dict[str, Local]], mesh: Mesh | None) -> dict[str, dict[str, Tensor]]:
    """Copies on CPU of the full tensors this rank owns, in the same folders; all of them where there is no mesh.

    Ranks of other copies of the model own none.
    """
    if mesh is None:
        return {
            folder: {name: local.detach().cpu().clone().contiguous() for name, (local, _) in items.items()}
            for folder, items in tensors.items()
        }
    owned: dict[str, dict[str, Tensor]] = {folder: {} for folder in tensors}
    if mesh.index["replicate"] != 0:
        return owned
    group = mesh.groups["replica"]
    load, rank = [0] * group.size(), dist.get_rank(group)
    for folder, items in tensors.items():
        for name, (local, layout) in items.items():
            # The owner is the rank with the fewest values so far; every rank computes the same.
            owner = load.index(min(load))
            load[owner] += 1 if layout is None else torch.Size(layout.full_shape).numel()
            full = local.cpu().clone() if layout is None else _gather(local, layout, mesh, owner)
            if full is not None and owner == rank:
                owned[folder][name] = full
    return owned


def _gather(local: Tensor, layout: Layout, mesh: Mesh, owner: int) -> Tensor | None:
    """The full tensor on rank `owner` of the group, None on the others."""
    group = mesh.groups["replica"]
    layouts = []  # of the same parameter on each rank
    for rank in range(group.size()):
        weights, tensor = divmod(rank, mesh.tensor[1])
        other = Layout.of(layout.name, layout.full_shape, (tensor, mesh.tensor[1]))
        layouts.append(other if layout.rows is None else other.with_rows((weights, mesh.weights[1])))
    # gather needs equal sizes: shorter shards are padded.
    flat = local.new_zeros(max(torch.Size(other.local_shape).numel() for other in layouts))
    flat[: local.numel()] = local.flatten()
    shards = [torch.empty_like(flat) for _ in layouts] if owner == dist.get_rank(group) else None
    dist.gather(flat, shards, dst=dist.get_global_rank(group, owner), group=group)
    if shards is None:
        return None
    full = torch.empty(layout.full_shape, dtype=local.dtype)
    for shard, other in zip(shards, layouts, strict=True):
        shaped = shard[: torch.Size(other.local_shape).numel()].view(other.local_shape)
        for mine, slices in other.slices():
            full[slices] = shaped[mine].to("cpu")
    return full
