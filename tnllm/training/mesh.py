"""The device mesh that a recipe's parallel section asks for.

sets = fit_mesh(config.parallel, rows, micro, world_size)   # keys to set so that a recipe runs on that many ranks
mesh = config_mesh(config.parallel, "cuda")                 # in each process
"""

from tnllm.errors import UserError
from tnllm.parallel.mesh import Mesh, open_mesh
from tnllm.training.config import most_rows
from tnllm.training.sections import ParallelSection


def fit_mesh(mesh: ParallelSection, rows: int, micro: int, world_size: int) -> dict[str, int]:
    """The keys to set for `world_size` ranks; empty if the recipe's `mesh` fits.

    `rows` of an optimizer step, `micro` of one pass. For a recipe of one rank, weights are sharded, and micro-batches get
    smaller if a step has too few rows for all ranks.
    Raises UserError if the recipe asks for another number of ranks.
    """
    if mesh.num_ranks == world_size:
        return {}
    if mesh.num_ranks == 1:
        rows, left = divmod(rows, world_size)
        fewer = {} if left or not rows or rows % micro == 0 else {"train.micro_batch_size": most_rows(rows, micro)}
        return {"parallel.shard": world_size, **fewer}
    raise UserError(
        f"the recipe's parallel section asks for {mesh.num_ranks} ranks (replicate {mesh.replicate} * "
        f"shard {mesh.shard} * sequence {mesh.sequence} * tensor {mesh.tensor}), and {world_size} "
        f"{'is' if world_size == 1 else 'are'} here; start that many with --nproc or torchrun, or --set the axes: "
        f"--set parallel.replicate=1 --set parallel.shard={world_size}"
    )


def config_mesh(axes: ParallelSection, device_type: str, fake: int | None = None) -> Mesh:
    """The mesh of a recipe's parallel section. `fake`: that many simulated ranks in one process."""
    return open_mesh(axes.replicate, axes.shard, axes.sequence, axes.tensor, device_type, axes.timeout_s, fake)
