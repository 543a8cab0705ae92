"""Training with several processes: starting them on this machine, and running as one of them.

    launch(["train", "tiny", "--out", "runs/tiny"], nproc=4, max_restarts=1)     # returns the exit code
    sets = fit_mesh(config.parallel, rows, micro, world_size)    # keys to set so that a recipe runs on that many ranks
    train_on_mesh(config, out, resume)                                           # in each process

`launch` runs torch.distributed.run (torchrun) on `python -m tnllm ARGS`; on several machines the user runs torchrun with
the same arguments. A process reads from its environment that it is one of several.
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
from tnllm.training.sections import ParallelSection

# After SIGTERM, the time for ranks to finish their pass and write a checkpoint before they are killed.
_SHUTDOWN_S = 300
_TORCHRUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(args: Sequence[str], nproc: int, max_restarts: int = 0) -> int:
    """Run `python -m tnllm ARGS` as `nproc` ranks on this machine; returns the exit code of the first that failed.

    If a rank dies, the others are stopped, and all are restarted up to `max_restarts` times. Raises RunError naming
    a rank that was killed by a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Otherwise restarted ranks find the addresses of the dead ones in the store of the first attempt.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        torchrun(["tnllm", *args], nproc, ["--max-restarts", str(max_restarts)], _SHUTDOWN_S)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise RunError(
            f"rank {rank} was lost ({name}); resume the last checkpoint with --resume auto, or let --max-restarts do it"
        ) from None
    except SignalException as stopped:
        # Rank 0 has reported whether everything is saved.
        return 128 + stopped.sigval
    return 0


def torchrun(module: Sequence[str], nproc: int, options: Sequence[str] = (), shutdown_s: int = 30) -> None:
    """Run `python -m MODULE...` as `nproc` ranks on this machine, with more `options` of torchrun.

    A signal to this process stops the ranks, which are killed after `shutdown_s`. Raises torch's ChildFailedError if a
    rank fails, and its SignalException after a signal.
    """
    from torch.distributed.run import get_args_parser, run

    # Its log repeats as an error what the rank itself has reported in one line.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    parser = get_args_parser()
    given = ["--standalone", "--nproc-per-node", str(nproc), *options]
    # Not every torch has it.
    given += ["--shutdown-timeout", str(shutdown_s)] if "--shutdown-timeout" in parser.format_help() else []
    handlers = {number: signal.getsignal(number) for number in _TORCHRUN_SIGNALS}
    try:
        run(parser.parse_args([*given, "-m", *module]))
    finally:
        # torchrun leaves its own, which raise.
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_on_mesh(config: RunConfig, out: Path, resume: str | None, **how: bool) -> None:
    """Train as one rank of a run; `how`: as in `train`. A rank that torchrun restarted resumes the newest checkpoint.

    Raises what `train` raises, and RunError if another rank is lost or does not respond for `parallel.timeout_s`.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = "auto"
    rank = os.environ["RANK"]
    try:
        # Without an index: the mesh gives each rank the GPU of its LOCAL_RANK.
        device = pick_device(config.train.device.partition(":")[0], "train.device")
        mesh = config_mesh(config.parallel, device.type)
        train(config, out, resume, mesh, None, **how)
        # A rank that fails exits without this: closing would wait for the others.
        close_mesh(mesh)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = f"silent for {config.parallel.timeout_s:g} s (parallel.timeout_s)" if late else "lost"
        raise RunError(
            f"rank {rank}: another rank was {what}; its own message, if it left one, says why; resume with --resume auto"
        ) from error


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed, which usually means that another rank is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("gloo", "Connection closed by peer", "Timed out waiting", "NCCL"))


def fit_mesh(mesh: ParallelSection, rows: int, micro: int, world_size: int) -> dict[str, int]:
    """The keys to set for `world_size` ranks; empty if the recipe's `mesh` fits.

    `rows` of an optimizer step, `micro` of one pass. For a recipe of one rank, weights are sharded, and micro-batches get
    smaller if a step has too few rows for all ranks. Raises UserError if the recipe asks for another number of ranks.
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
