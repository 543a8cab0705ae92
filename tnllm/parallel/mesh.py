"""The ranks of a run and the groups they form.

    mesh = open_mesh(replicate=1, shard=2, sequence=2, tensor=2, device_type="cuda", timeout_s=600)
    mesh.data_rank, mesh.data_size       # which rows of a batch this rank reads
    mesh.groups["tensor"]                # the process group along an axis
    close_mesh(mesh)

Four axes, outermost first: copies of the model (replicate), ranks that share a copy's weights (shard), ranks that share
a row (sequence), ranks that share a matrix (tensor). Neighbouring ranks differ in `tensor`, which talks the most, so it
should stay within a machine. Weights are spread over shard and sequence together.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tnllm.errors import UserError

AXES = ("replicate", "shard", "sequence", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this rank's place on each, and its process groups.

    `groups`: "tensor" and "sequence" along those axes; "batch", the ranks that differ in the tokens they read
    (replicate, shard and sequence); "replica", the ranks of one copy of the model; "control" and "files", all ranks,
    on CPU.
    `fsdp` is the device mesh weights are spread (and replicated) over; None where one rank would be on it.
    """

    sizes: dict[str, int]
    rank: int
    device: torch.device
    groups: dict[str, dist.ProcessGroup]
    fsdp: DeviceMesh | None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data_size * self.sizes["sequence"] * self.sizes["tensor"]

    @property
    def place(self) -> dict[str, int]:
        """This rank's coordinate on each axis."""
        left, found = self.rank, {}
        for axis in reversed(AXES):
            left, found[axis] = divmod(left, self.sizes[axis])
        return found

    @property
    def data_rank(self) -> int:
        """Which of `data_size` parts of a batch this rank reads."""
        return self.place["replicate"] * self.sizes["shard"] + self.place["shard"]

    @property
    def data_size(self) -> int:
        """Ranks that read different rows: replicate * shard."""
        return self.sizes["replicate"] * self.sizes["shard"]

    @property
    def weights(self) -> tuple[int, int]:
        """(rank, size) among those that share a copy's weights: shard * sequence."""
        size = self.sizes["sequence"]
        return self.place["shard"] * size + self.place["sequence"], self.sizes["shard"] * size

    @property
    def tensor(self) -> tuple[int, int]:
        """(rank, size) along the tensor axis."""
        return self.place["tensor"], self.sizes["tensor"]


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def open_mesh(
    replicate: int,
    shard: int,
    sequence: int,
    tensor: int,
    device_type: str,
    timeout_s: float,
    fake: int | None = None,
    store: dist.Store | None = None,
) -> Mesh:
    """Join the other ranks (torchrun's environment says how) and form the groups.

    `device_type` "cuda" speaks NCCL and takes the GPU of its LOCAL_RANK; "cpu" speaks gloo. A collective that others do
    not join within `timeout_s` raises. `fake` builds the mesh as rank 0 of that many imaginary ranks, in one process,
    where collectives do nothing. `store` is where ranks find each other, None: as the environment says; a process that
    opens one mesh after another needs a fresh one each time, or it finds the addresses of the mesh before.
    Raises UserError where the axes do not multiply to the number of ranks.
    """
    sizes = dict(zip(AXES, (replicate, shard, sequence, tensor), strict=True))
    product = replicate * shard * sequence * tensor
    timeout = datetime.timedelta(seconds=timeout_s)
    world = fake or int(os.environ.get("WORLD_SIZE", "1"))
    if product != world:
        axes = " * ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(f"{world} ranks were started, but the parallel section asks for {product} ({axes})")
    device = torch.device(device_type)
    meet: dict[str, Any] = {"timeout": timeout}
    if store is not None:
        meet |= {"store": store, "rank": int(os.environ["RANK"]), "world_size": world}
    if fake is not None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    elif device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"local rank {device.index} has no GPU of its own: torch sees {torch.cuda.device_count()}; "
                "start as many ranks on each machine as it has GPUs"
            )
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", **meet)
    else:
        dist.init_process_group("gloo", **meet)
    rank = dist.get_rank()
    grid = torch.arange(world).view(replicate, shard, sequence, tensor)
    r, s, q, p = (int(n) for n in (grid == rank).nonzero()[0])
    small = None if fake is None else "fake"
    members = {
        "tensor": grid[r, s, q, :],
        "sequence": grid[r, s, :, p],
        "batch": grid[:, :, :, p],
        "replica": grid[r],
    }
    groups = {
        name: dist.new_group(
            ranks.flatten().tolist(), timeout=timeout, use_local_synchronization=fake is None, group_desc=name
        )
        for name, ranks in members.items()
    }
    # A checkpoint written in the background must not mix its messages with those of the steps, nor run out of time.
    groups["control"] = dist.new_group(backend=small or "gloo", timeout=timeout)
    groups["files"] = dist.new_group(backend=small or "gloo", timeout=max(timeout, datetime.timedelta(hours=1)))
    fsdp = None
    if replicate * shard * sequence > 1:
        whole = init_device_mesh(
            device_type, (replicate, shard * sequence, tensor), mesh_dim_names=("replicate", "weights", "tensor")
        )
        fsdp = whole["replicate", "weights"] if replicate > 1 else whole["weights"]
    return Mesh(sizes, rank, device, groups, fsdp)


def close_mesh(mesh: Mesh) -> None:
    """Leave the groups, once all ranks are here: one that left early would break the others' last exchange."""
    if mesh.device.type == "cuda":
        # The host runs ahead: what it enqueued may still be travelling.
        torch.cuda.synchronize(mesh.device)
    if dist.get_backend() != "fake":
        dist.barrier(mesh.groups["files"])
    dist.destroy_process_group()
