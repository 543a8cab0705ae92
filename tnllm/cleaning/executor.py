"""Runs the tasks of a stage: on this machine, or on Slurm or Ray by datatrove's own executors.

run_stages([Stage("filter", steps, tasks=12, log=work / "filter")], "local", 4, settings.slurm, on_progress)

datatrove records finished tasks under `work/STAGE/completions`. A task that was stopped runs again from its start and
replaces its files atomically. Each stage waits for the one before it.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from tnllm.cleaning.settings import SlurmSection
from tnllm.cleaning.worker_counter import new_counter, use_counter
from tnllm.data.encode import ctrl_c_is_ours
from tnllm.errors import MissingExtra, RunError, UserError
from tnllm.files import write_text_atomic
from tnllm.progress import log

ExecutorName = Literal["local", "slurm", "ray"]
OnProgress = Callable[["StageProgress"], None]
_POLL_S = 0.5
# Holds the id of a stage's last Slurm job.
_JOB = "job"


@dataclass(frozen=True)
class StageProgress:
    """Progress of a stage: finished tasks of all, and the input bytes (total 0: not counted) and documents of this run."""

    stage: str
    done: int
    tasks: int
    num_bytes: int
    total_bytes: int
    documents: int


@dataclass(frozen=True)
class Stage:
    """A pipeline and its number of tasks. datatrove logs to `log`; `sizes` are the input bytes of each task."""

    name: str
    steps: Sequence[PipelineStep]
    tasks: int
    log: Path
    sizes: Sequence[int] = ()

    @property
    def is_done(self) -> bool:
        return all((self.log / "completions" / f"{rank:05d}").exists() for rank in range(self.tasks))


class Local(LocalPipelineExecutor):
    """datatrove's local executor for one task at a time, logging only to files; `_run_local` runs the workers."""

    def run_rank(self, rank: int) -> None:
        """One task in this process."""
        # A task changes its steps, so each works on a copy.
        executor = copy.deepcopy(self)
        with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
            executor._run_for_rank(rank, local_rank=1)
        _without_log_sink()


def _without_log_sink() -> None:
    # datatrove points its logger at stderr again after each task.
    from loguru import logger

    logger.remove()


def run_stages(
    stages: Sequence[Stage],
    executor: ExecutorName,
    workers: int,
    slurm: SlurmSection,
    on_progress: OnProgress,
) -> bool:
    """Run what is not done yet. Returns whether everything is done (Slurm only submits). Raises UserError and RunError."""
    unfinished = [stage for stage in stages if not stage.is_done]
    if not unfinished:
        return True
    if executor == "local":
        for stage in unfinished:
            _run_local(stage, workers, on_progress)
        return True
    _check_cluster(executor)
    if executor == "ray":
        from datatrove.executor import RayPipelineExecutor

        for stage in unfinished:
            RayPipelineExecutor(list(stage.steps), tasks=stage.tasks, workers=workers, logging_dir=str(stage.log)).run()
            if not stage.is_done:
                raise RunError(f"some tasks of {stage.name} failed; see {stage.log}/logs, then run the same again")
        return True
    _submit(unfinished, workers, slurm)
    return False


def _check_cluster(executor: ExecutorName) -> None:
    import importlib.util
    import shutil

    if executor == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "--executor is slurm, but there is no sbatch on this machine; run on a login node, or use local"
        )
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise MissingExtra("data", "ray (pip install ray)")


def _submit(stages: Sequence[Stage], workers: int, slurm: SlurmSection) -> None:
    """Submit each stage as a job array that waits for the one before it; refused while arrays of this run are queued."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    _refuse_queued([stage.log / _JOB for stage in stages])
    jobs: list[SlurmPipelineExecutor] = []
    for stage in stages:
        executor = SlurmPipelineExecutor(
            list(stage.steps),
            tasks=stage.tasks,
            workers=workers,
            time=slurm.time,
            partition=slurm.partition,
            cpus_per_task=slurm.cpus_per_task,
            mem_per_cpu_gb=slurm.mem_per_cpu_gb,
            env_command=slurm.env_command,
            sbatch_args=dict(slurm.sbatch_args),
            job_name=f"tnllm-{stage.name}",
            logging_dir=str(stage.log),
            depends=jobs[-1] if jobs else None,
            mail_type="NONE",
        )
        jobs.append(executor)
    _without_log_sink()
    try:
        jobs[-1].run()
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"sbatch refused the job (exit {error.returncode}; its message is above); the keys of section slurm: "
            "tnllm data clean --keys"
        ) from None
    finally:
        for stage, executor in zip(stages, jobs, strict=True):
            if executor.job_id:
                write_text_atomic(stage.log / _JOB, str(executor.job_id))
    log("submitted: " + ", ".join(f"{stage.name} {job.job_id}" for stage, job in zip(stages, jobs, strict=True)))


def _refuse_queued(records: Sequence[Path]) -> None:
    """Raise UserError if jobs of an earlier submission are queued or running: two would write the same files."""
    ours = {path.read_text("utf-8") for path in records if path.exists()}
    listed = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True)
    if listed.returncode:
        raise UserError(f"squeue does not answer: {listed.stderr.strip() or listed.returncode}; try again later")
    if queued := sorted(ours & set(listed.stdout.split()), key=int):
        raise UserError(
            f"jobs {', '.join(queued)} of this run are queued or running; wait for them, or cancel them (scancel "
            f"{' '.join(queued)}), then run the same again"
        )


def _run_local(stage: Stage, workers: int, on_progress: OnProgress) -> None:
    executor = Local(list(stage.steps), tasks=stage.tasks, logging_dir=str(stage.log))
    _without_log_sink()
    ranks = executor.get_incomplete_ranks()
    done = stage.tasks - len(ranks)
    context = get_context("spawn")
    counter = new_counter(context)
    total = sum(stage.sizes[rank] for rank in ranks) if stage.sizes else 0
    workers = min(workers, len(ranks))

    def show() -> None:
        on_progress(StageProgress(stage.name, done, stage.tasks, counter[0], total, counter[1]))

    if workers == 1:
        use_counter(counter)
        try:
            with _repeated(show):
                for rank in ranks:
                    executor.run_rank(rank)
                    done += 1
        finally:
            use_counter(None)
        show()
        return
    with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
        try:
            with ctrl_c_is_ours():
                running: set[Future[None]] = {pool.submit(executor.run_rank, rank) for rank in ranks}
            while running:
                finished, running = wait(running, _POLL_S, FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done += 1
                show()
        except BrokenProcessPool:
            raise RunError(
                f"a worker died in stage {stage.name} (out of memory?); finished shards are kept: run the same again, "
                "or with fewer --workers"
            ) from None
        except BaseException:
            # Running tasks are killed, not waited for: the next run starts them again.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _repeated(show: Callable[[], None]) -> Iterator[None]:
    """Call `show` every half second from a thread while the block runs in this one."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(_POLL_S):
            show()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _start_worker(counter: Any) -> None:
    sys.stdout = open(os.devnull, "w")
    use_counter(counter)


def stage_stats(stage: Stage) -> dict[str, dict[str, Any]]:
    """Counts of a finished stage over all tasks: step → label → total, and `seconds`."""
    totals: dict[str, dict[str, Any]] = {}
    for path in sorted((stage.log / "stats").glob("*.json")):
        for step in json.loads(path.read_text("utf-8")):
            name = step["name"].rpartition(": ")[2]
            counts = totals.setdefault(name, {"seconds": 0.0})
            spent = step.get("time_stats")
            counts["seconds"] += spent["total"] if isinstance(spent, dict) else float(spent or 0)
            for label, value in step.get("stats", {}).items():
                number = value["total"] if isinstance(value, dict) else value
                counts[label] = counts.get(label, 0) + int(number)
    return totals
