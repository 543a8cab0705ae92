"""The device mesh of a run: its axes, this rank's index on each, and the process groups.

    mesh = open_mesh(replicate=1, shard=2, sequence=2, tensor=2, device_type="cuda", timeout_s=600)
    mesh.data_rank, mesh.data_size       # which rows of a batch this rank reads
    mesh.groups["tensor"]                # the process group along an axis
    close_mesh(mesh)

Four axes, outermost first: copies of the model (replicate), ranks that shard a copy's weights (shard), ranks that split
a row (sequence), ranks that split a matrix (tensor). Consecutive ranks differ in `tensor`, which communicates most and
should stay within a machine. Weights are sharded over the shard and sequence axes together.
"""

import datetime
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tnllm.errors import UserError

AXES = ("replicate", "shard", "sequence", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes, this rank's index on each, and its process groups.

    `groups`: "tensor" and "sequence" along those axes; "batch", the ranks that read different tokens (replicate, shard
    and sequence); "replica", the ranks of one copy of the model; "control" and "files", all ranks, on CPU.
    `fsdp` is the device mesh that weights are sharded (and replicated) over; None if it would have one rank.
    """

    sizes: dict[str, int]
    rank: int
    device: torch.device
    groups: dict[str, dist.ProcessGroup]
    fsdp: DeviceMesh | None

    @property
    def index(self) -> dict[str, int]:
        rest, index = self.rank, {}
        for axis in reversed(AXES):
            rest, index[axis] = divmod(rest, self.sizes[axis])
        return index

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` shards of a batch this rank reads."""
        return self.index["replicate"] * self.sizes["shard"] + self.index["shard"]

    @property
    def data_size(self) -> int:
        """Ranks that read different rows: replicate * shard."""
        return self.sizes["replicate"] * self.sizes["shard"]

    @property
    def weights(self) -> tuple[int, int]:
        """(rank, size) among the ranks that shard a copy's weights: shard * sequence."""
        size = self.sizes["sequence"]
        return self.index["shard"] * size + self.index["sequence"], self.sizes["shard"] * size

    @property
    def tensor(self) -> tuple[int, int]:
        """(rank, size) along the tensor axis."""
        return self.index["tensor"], self.sizes["tensor"]


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def open_mesh(
    replicate: int, shard: int, sequence: int, tensor: int, device_type: str, timeout_s: float, fake: int | None = None
) -> Mesh:
    """Initialise torch.distributed from torchrun's environment variables and form the process groups.

    `device_type` "cuda" uses NCCL and the GPU LOCAL_RANK; "cpu" uses gloo. A collective that not all ranks join within
    `timeout_s` raises. `fake` builds the mesh as rank 0 of that many simulated ranks, in one process, where collectives
    do nothing. Raises UserError if the product of the axes is not the number of ranks.
    """
    sizes = dict(zip(AXES, (replicate, shard, sequence, tensor), strict=True))
    product = math.prod(sizes.values())
    timeout = datetime.timedelta(seconds=timeout_s)
    world = fake or int(os.environ.get("WORLD_SIZE", "1"))
    if product != world:
        axes = " * ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(f"{world} ranks were started, but the parallel section asks for {product} ({axes})")
    device = torch.device(device_type)
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
        dist.init_process_group("nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    rank = dist.get_rank()
    grid = torch.arange(world).view(replicate, shard, sequence, tensor)
    r, s, q, p = (int(n) for n in (grid == rank).nonzero()[0])
    control_backend = "gloo" if fake is None else "fake"
    members = {"tensor": grid[r, s, q], "sequence": grid[r, s, :, p], "batch": grid[:, :, :, p], "replica": grid[r]}
    groups = {
        name: dist.new_group(
            ranks.flatten().tolist(), timeout=timeout, use_local_synchronization=fake is None, group_desc=name
        )
        for name, ranks in members.items()
    }
    # Checkpoints written in the background need a group of their own, as steps communicate meanwhile, and more time.
    groups["control"] = dist.new_group(backend=control_backend, timeout=timeout)
    groups["files"] = dist.new_group(backend=control_backend, timeout=max(timeout, datetime.timedelta(hours=1)))
    fsdp = None
    if replicate * shard * sequence > 1:
        device_mesh = init_device_mesh(
            device_type, (replicate, shard * sequence, tensor), mesh_dim_names=("replicate", "weights", "tensor")
        )
        fsdp = device_mesh["replicate", "weights"] if replicate > 1 else device_mesh["weights"]
    return Mesh(sizes, rank, device, groups, fsdp)


def close_mesh(mesh: Mesh) -> None:
    """Destroy the process groups after a barrier: a rank that left early would break the others' last collective."""
    if mesh.device.type == "cuda":
        # Collectives that the host has enqueued may still be running.
        torch.cuda.synchronize(mesh.device)
    if dist.get_backend() != "fake":
        dist.barrier(mesh.groups["files"])
    dist.destroy_process_group()
