"""Many processes: start them on this machine, and be one of them.

    launch(["train", "tiny", "--out", "runs/tiny"], nproc=4, max_restarts=1)     # returns the exit code
    config = fit_mesh(load_recipe(name, sets), world_size)
    train_on_mesh(config, out, resume)                                           # in each process

`launch` runs torch.distributed.run (torchrun) on `python -m tnllm ARGS`; on several machines people run torchrun
themselves, on the same arguments. A process knows from its environment that it is one of several.
"""

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch

from tnllm.device import pick_device
from tnllm.errors import RunError, UserError
from tnllm.parallel.mesh import Mesh, close_mesh, open_mesh
from tnllm.training.config import RunConfig, most_rows
from tnllm.training.loop import train

# After SIGTERM, the time ranks have to finish their pass and write a checkpoint before they are killed.
_SHUTDOWN_S = 300


def launch(args: Sequence[str], nproc: int, max_restarts: int = 0) -> int:
    """Run `python -m tnllm ARGS` as `nproc` ranks on this machine; returns the exit code of the first that failed.

    Where a rank dies, the others are stopped, and all start again up to `max_restarts` times. Raises RunError naming
    a rank that died without a word.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # Its log repeats as an error what the rank itself has said in one line.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    # Otherwise ranks that start again find the addresses of the dead in the store of the first attempt.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    options = ["--standalone", "--nproc-per-node", str(nproc), "--max-restarts", str(max_restarts)]
    options += ["--shutdown-timeout", str(_SHUTDOWN_S)] if _knows_shutdown_timeout() else []
    try:
        run(get_args_parser().parse_args([*options, "-m", "tnllm", *args]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise RunError(
            f"rank {rank} was lost ({name}); go on from the last checkpoint with --resume auto, or let --max-restarts do so"
        ) from None
    except SignalException as stopped:
        # Rank 0 has said whether all is saved.
        return 128 + stopped.sigval
    return 0


def _knows_shutdown_timeout() -> bool:
    from torch.distributed.run import get_args_parser

    return "--shutdown-timeout" in get_args_parser().format_help()


def fit_mesh(config: RunConfig, world_size: int) -> dict[str, int]:
    """The keys to set for `world_size` ranks: none where the recipe's mesh fits.

    For a recipe of one rank weights are sharded, and a rank takes fewer rows at a time where a step has too few for all.
    Raises UserError where the recipe asks for another number of ranks.
    """
    if config.world_size == world_size:
        return {}
    if config.world_size == 1:
        rows, left = divmod(config.global_batch_rows, world_size)
        most = config.train.micro_batch_size
        fewer = {} if left or not rows or rows % most == 0 else {"train.micro_batch_size": most_rows(rows, most)}
        return {"parallel.shard": world_size, **fewer}
    mesh = config.parallel
    raise UserError(
        f"the recipe's parallel section asks for {config.world_size} ranks (replicate {mesh.replicate} * "
        f"shard {mesh.shard} * sequence {mesh.sequence} * tensor {mesh.tensor}), and {world_size} "
        f"{'is' if world_size == 1 else 'are'} here; start that many with --nproc or torchrun, or --set the axes: "
        f"--set parallel.replicate=1 --set parallel.shard={world_size}"
    )


def config_mesh(config: RunConfig, device_type: str, fake: int | None = None) -> Mesh:
    """The mesh of a recipe's parallel section; with `fake`, in one process."""
    axes = config.parallel
    return open_mesh(axes.replicate, axes.shard, axes.sequence, axes.tensor, device_type, axes.timeout_s, fake)


def train_on_mesh(config: RunConfig, out: Path, resume: str | None) -> None:
    """Be one rank of a run. A rank that torchrun has started again goes on from the newest checkpoint.

    Raises what `train` raises, and RunError where another rank is lost or silent for `parallel.timeout_s`.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = "auto"
    rank = os.environ["RANK"]
    try:
        # Without an index: the mesh gives each rank the GPU of its LOCAL_RANK.
        device = pick_device(config.train.device.partition(":")[0], "train.device")
        mesh = config_mesh(config, device.type)
        train(config, out, resume, mesh)
        # A rank that fails leaves at once: closing would wait for the others.
        close_mesh(mesh)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = f"silent for {config.parallel.timeout_s:g} s (parallel.timeout_s)" if late else "lost"
        raise RunError(
            f"rank {rank}: another rank was {what}; its own message, if it left one, says why; go on with --resume auto"
        ) from error


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed, which mostly means that another rank is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("gloo", "Connection closed by peer", "Timed out waiting", "NCCL"))
