"""One rank of `bench_scaling`: run by torchrun as `python -m tnllm.bench.scale_rank TASK.json`, not by people.

Every rank runs the task's jobs in the same order, each on its own mesh. Rank 0 appends results to the task's file of
events, one JSON object per line. A rank that fails appends the reason and exits at once: the others may wait for it in a
collective, so torchrun stops them, and the parent starts new ranks for the remaining jobs.
"""

import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tnllm.bench.scale import CHECK_STEPS, LONGEST, ONE, Job, Plan, run_config
from tnllm.bench.timing import synchronize
from tnllm.bench.train import Step, reset, step_environment, timed_step
from tnllm.parallel.mesh import Mesh, close_mesh, open_mesh
from tnllm.parallel.ranks import Distributed, SingleProcess
from tnllm.parallel.traffic import TRAFFIC_AXES, Traffic, axis_names
from tnllm.training.launch import is_lost_rank
from tnllm.training.loop import compute_dtype
from tnllm.training.metrics import matmul_rate

# Largest relative difference of a loss, and of a gradient's norm, from one GPU's in any of ten steps. fp32: sums in
# another order, as in tests/parallel. bf16: a mesh rounds other partial sums to 8 bits, and ten updates propagate that;
# measured 9e-5 and 1.1e-4 (widths of 385m and 1b, two H100): docs/parallel.md.
LIMITS = {torch.float32: (2e-5, 5e-4), torch.bfloat16: (1e-3, 2e-3)}
_PROFILED = 2


class Ranks:
    """This process's rank, device and rendezvous, for all jobs."""

    def __init__(self, plan: Plan, events: Path) -> None:
        self.plan, self.events = plan, events
        self.rank = int(os.environ["RANK"])
        self.device = torch.device(plan.device)
        if plan.device == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self._store = next(iter(dist.rendezvous("env://")))[0]
        self._opened = 0

    def write(self, event: dict[str, Any]) -> None:
        """Append one line; a single system call, so that lines of several ranks do not mix."""
        file = os.open(self.events, os.O_WRONLY | os.O_APPEND)
        os.write(file, (json.dumps(event) + "\n").encode())
        os.close(file)

    def mesh(self, job: Job) -> Mesh | None:
        """The job's mesh, with its own rendezvous; None for one GPU."""
        if job.mesh == ONE:
            return None
        self._opened += 1
        store = dist.PrefixStore(f"mesh-{self._opened}", self._store)
        return open_mesh(**job.axes, device_type=self.plan.device, timeout_s=self.plan.timeout_s, store=store)


def main(task: Path) -> None:
    """Do the jobs of a task."""
    given = json.loads(task.read_text())
    plan, jobs = Plan(**given["plan"]), [Job(**job) for job in given["jobs"]]
    if plan.plugin:
        importlib.import_module(plan.plugin)
    ranks = Ranks(plan, Path(given["events"]))
    if ranks.rank == 0:
        ranks.write({"environment": _environment(plan, jobs[0], ranks.device)})
    wrong: set[str] = set()
    for job in jobs:
        if job.needs in wrong:
            if ranks.rank == 0:
                ranks.write({"job": job.name, "result": {"status": "wrong", "reason": "its check did not pass"}})
            continue
        if ranks.rank == 0:
            ranks.write({"start": _announce(job)})
        try:
            result = {"check": check, "time": time_steps, "longest": longest}[job.kind](job, ranks)
        except torch.OutOfMemoryError as error:
            _exit(ranks, job, "out of memory", error)
        except Exception as error:  # any failure costs this job only: the parent continues with the others
            _exit(ranks, job, "failed", error)
        if job.kind == "check" and job.mesh != ONE and not result["passed"]:
            wrong.add(job.name)
        if ranks.rank == 0:
            ranks.write({"job": job.name, "result": result})


def _announce(job: Job) -> str:
    where = "one GPU" if job.mesh == ONE else f"{job.mesh} on {job.ranks}"
    what = {"check": "checking", "time": "timing", "longest": "the longest row of"}[job.kind]
    return f"{what} {job.preset}, {where}: {job.rows} x {job.seq_len} tokens"


def _exit(ranks: Ranks, job: Job, status: str, error: Exception) -> NoReturn:
    """Report the failure and end this process without waiting for collectives that will never complete."""
    # A rank that only lost its connection to a failed one has nothing to add.
    if status == "out of memory" or not (isinstance(error, RuntimeError) and is_lost_rank(error)):
        first, *more = str(error).strip().splitlines() or [""]
        # A compiler's first line says where, its last line why.
        message = f"{first} {more[-1].strip()}" if first.endswith(":") and more else first
        reason = f"rank {ranks.rank}: {type(error).__name__}: {message[:300]}"
        ranks.write({"job": job.name, "failed": {"status": status, "reason": reason}})
    if status != "out of memory":
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _environment(plan: Plan, job: Job, device: torch.device) -> dict[str, Any]:
    environment = step_environment(run_config(job, plan), device, matmul_rate(device), plan.steps, plan.warmup)
    if device.type == "cuda":
        environment["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return environment


def check(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Ten steps of a small model in the precision that will be timed; losses and norms are compared with `job.expected`."""
    reset(ranks.device)
    config = run_config(job, ranks.plan)
    mesh = ranks.mesh(job)
    step = Step(config, ranks.device, mesh)
    for _ in range(CHECK_STEPS):
        step()
    measured: dict[str, Any] = {"loss": step.losses, "norm": step.norms}
    _close(mesh)
    if job.expected is None:
        return measured
    loss, norm = (_difference(measured[key], job.expected[key]) for key in ("loss", "norm"))
    loss_limit, norm_limit = LIMITS[compute_dtype(config, ranks.device)]
    return {
        "status": "ok",
        "loss_difference": loss,
        "norm_difference": norm,
        "loss_limit": loss_limit,
        "norm_limit": norm_limit,
        "first_loss": measured["loss"][0],
        "last_loss": measured["loss"][-1],
        # Written so that NaN fails.
        "passed": loss <= loss_limit and norm <= norm_limit,
    }


def _difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference; NaN if any is not finite."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.nan


def time_steps(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Full training steps, timed; then a few more under the profiler, to measure communication."""
    reset(ranks.device)
    plan, device = ranks.plan, ranks.device
    left = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None
    config = run_config(job, plan)
    mesh = ranks.mesh(job)
    everyone = SingleProcess() if mesh is None else Distributed(mesh)
    step, times = timed_step(config, device, plan.steps, plan.warmup, mesh)
    if times["peak_gib"] is not None:
        times["peak_gib"] = max(everyone.all_gather(times["peak_gib"]))
    result: dict[str, Any] = {"status": "ok", **times, "left_gib": left}
    if mesh is not None:
        result |= profile_communication(step, mesh)
    if not all(map(math.isfinite, step.losses)):
        result |= {"status": "failed", "reason": "the loss is not finite"}
    del step
    _close(mesh)
    return result


def profile_communication(step: Step, mesh: Mesh) -> dict[str, Any]:
    """Bytes that a rank sends in a step and time it spends in collectives, by axis, over a few more steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if mesh.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # Counting slows a step down, so it has one of its own. All ranks do the same, so that none delays the others.
    with Traffic() as traffic:
        step()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_PROFILED):
            step()
        synchronize(mesh.device)
    result: dict[str, Any] = {f"sent_{axis}": nbytes for axis, nbytes in traffic.by_axis(mesh).items()}
    if mesh.rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
            if mesh.device.type == "cuda":
                result |= times_of_nccl(events, axis_names(mesh), _PROFILED)
            else:
                # gloo's events do not name their group, so only the sum is known.
                result["comm_ms"] = sum(e["dur"] for e in events if e["name"].startswith("gloo:")) / _PROFILED / 1e3
    return result


def times_of_nccl(events: list[dict[str, Any]], axes: dict[str, str], steps: int) -> dict[str, float]:
    """Milliseconds a step of a profiler's trace spends in NCCL's kernels: comm_ms, comm_exposed_ms, ms_AXIS.

    `axes` maps names of process groups to axes. Exposed is the time in which no other kernel ran. Values that the trace
    does not give are left out.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in spans if event.get("cat") == "kernel"]
    nccl = [event for event in kernels if event["name"].startswith("nccl")]
    if not nccl:
        return {}
    # If a kernel does not name its group, the call that launched it does.
    calls = {
        event["args"]["External id"]: event["args"]
        for event in spans
        if event["name"] == "record_param_comms" and "External id" in event.get("args", {})
    }
    durations = dict.fromkeys(TRAFFIC_AXES, 0.0)
    named = False
    for event in nccl:
        args = event.get("args", {})
        if "Process Group Name" not in args:
            args = calls.get(args.get("External id"), {})
        named = named or "Process Group Name" in args
        durations[axes.get(str(args.get("Process Group Name")), "other")] += event["dur"]
    busy = _union((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    working = _union(
        (event["ts"], event["ts"] + event["dur"]) for event in kernels if not event["name"].startswith("nccl")
    )
    return {
        "comm_ms": sum(event["dur"] for event in nccl) / steps / 1e3,
        "comm_exposed_ms": (busy - working) / steps / 1e3,
        **({f"ms_{axis}": duration / steps / 1e3 for axis, duration in durations.items()} if named else {}),
    }


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def longest(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Double the row until a step does not fit; each length that fits is reported at once, as an OOM ends the ranks."""
    length, fits = job.seq_len, None
    mesh = ranks.mesh(job)
    while length // job.ranks <= LONGEST:
        reset(ranks.device)
        step = Step(run_config(Job(**{**vars(job), "seq_len": length}), ranks.plan), ranks.device, mesh)
        # The first step allocates the optimizer's moments, so the second one is the larger.
        for _ in range(2):
            step()
        synchronize(ranks.device)
        fits = length
        if ranks.rank == 0:
            ranks.write({"job": job.name, "partial": {"longest": fits, "tried": 2 * length}})
        del step
        length *= 2
    _close(mesh)
    return {"status": "ok", "longest": fits, "tried": fits}


def _close(mesh: Mesh | None) -> None:
    if mesh is not None:
        close_mesh(mesh)


if __name__ == "__main__":
    # Through its name, so that what a plugin patches in the module takes effect here.
    importlib.import_module("tnllm.bench.scale_rank").main(Path(sys.argv[1]))
