"""One rank of `bench_scaling`: run by torchrun as `python -m tnllm.bench.scale_rank TASK.json`, not by people.

Every rank goes through the task's jobs in the same order, each on a mesh of its own. Rank 0 appends what was found to
the task's file of events, one JSON object a line. A rank in which something fails appends that and leaves at once: the
others may wait for it in a collective, so torchrun stops them, and the parent starts new ranks for the jobs after.
"""

import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tnllm.bench.scale import GATE_STEPS, LONGEST, ONE, Job, Plan, run_config
from tnllm.bench.train import Step, forget, timed_step, wait
from tnllm.device import describe_device
from tnllm.parallel.mesh import Mesh, close_mesh, open_mesh
from tnllm.parallel.ranks import Distributed, SingleProcess
from tnllm.parallel.traffic import TRAFFIC_AXES, Traffic, axis_names
from tnllm.training.launch import is_lost_rank
from tnllm.training.loop import compute_dtype
from tnllm.training.metrics import matmul_rate

# Largest relative difference of a loss, and of a gradient's norm, from one GPU's in any of ten steps. fp32: sums in
# another order, as in tests/parallel. bf16: a mesh rounds other partial sums to 8 bits, and ten updates carry that on;
# found are 9e-5 and 1.1e-4 (widths of 385m and 1b, two H100): docs/parallel.md.
LIMITS = {torch.float32: (2e-5, 5e-4), torch.bfloat16: (1e-3, 2e-3)}
_PROFILED = 2


class Ranks:
    """This process among the others, over all jobs."""

    def __init__(self, plan: Plan, events: Path) -> None:
        self.plan, self.events = plan, events
        self.rank = int(os.environ["RANK"])
        self.device = torch.device(plan.device)
        if plan.device == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        self._store = next(iter(dist.rendezvous("env://")))[0]
        self._opened = 0

    def say(self, event: dict[str, Any]) -> None:
        """Append one line; a single write, so that lines of several ranks do not mix."""
        file = os.open(self.events, os.O_WRONLY | os.O_APPEND)
        os.write(file, (json.dumps(event) + "\n").encode())
        os.close(file)

    def mesh(self, job: Job) -> Mesh | None:
        """The job's mesh, where ranks meet at an address of its own; None for one GPU."""
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
        ranks.say({"environment": _environment(plan, jobs[0], ranks.device)})
    wrong: set[str] = set()
    for job in jobs:
        if job.needs in wrong:
            if ranks.rank == 0:
                ranks.say({"job": job.name, "result": {"status": "wrong", "reason": "its check was not passed"}})
            continue
        if ranks.rank == 0:
            ranks.say({"start": _announce(job)})
        try:
            found = {"gate": gate, "time": time_steps, "longest": longest}[job.kind](job, ranks)
        except torch.OutOfMemoryError as error:
            _leave(ranks, job, "out of memory", error)
        except Exception as error:  # whatever it is, the other cases go on without it
            _leave(ranks, job, "failed", error)
        if job.kind == "gate" and job.mesh != ONE and not found["passed"]:
            wrong.add(job.name)
        if ranks.rank == 0:
            ranks.say({"job": job.name, "result": found})


def _announce(job: Job) -> str:
    where = "one GPU" if job.mesh == ONE else f"{job.mesh} on {job.ranks}"
    what = {"gate": "checking", "time": "timing", "longest": "the longest row of"}[job.kind]
    return f"{what} {job.preset}, {where}: {job.rows} x {job.seq_len} tokens"


def _leave(ranks: Ranks, job: Job, status: str, error: Exception) -> None:
    """Say what happened and end this process without waiting for collectives that will never be joined."""
    # Who only heard of another's end has nothing to tell.
    if status == "out of memory" or not (isinstance(error, RuntimeError) and is_lost_rank(error)):
        first, *more = str(error).strip().splitlines() or [""]
        # A compiler's first line is the place, its last one the reason.
        told = f"{first} {more[-1].strip()}" if first.endswith(":") and more else first
        reason = f"rank {ranks.rank}: {type(error).__name__}: {told[:300]}"
        ranks.say({"job": job.name, "failed": {"status": status, "reason": reason}})
    if status != "out of memory":
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _environment(plan: Plan, job: Job, device: torch.device) -> dict[str, Any]:
    peak = matmul_rate(device)
    found: dict[str, Any] = {
        **describe_device(device),
        "dtype": str(compute_dtype(run_config(job, plan), device)).removeprefix("torch."),
        "compiled": plan.compiled,
        "matmul_tflop_per_s": None if peak is None else peak / 1e12,
        "steps": plan.steps,
        "warmup": plan.warmup,
    }
    if device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["gpu_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return found


def gate(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Ten steps of a small model in the precision that will be timed: losses and norms, beside one GPU's if expected."""
    forget(ranks.device)
    config = run_config(job, ranks.plan)
    mesh = ranks.mesh(job)
    step = Step(config, ranks.device, mesh)
    for _ in range(GATE_STEPS):
        step()
    found: dict[str, Any] = {"loss": step.losses, "norm": step.norms}
    _close(mesh)
    if job.expected is None:
        return found
    loss, norm = (_difference(found[key], job.expected[key]) for key in ("loss", "norm"))
    loss_limit, norm_limit = LIMITS[compute_dtype(config, ranks.device)]
    return {
        "status": "ok",
        "loss_difference": loss,
        "norm_difference": norm,
        "loss_limit": loss_limit,
        "norm_limit": norm_limit,
        "first_loss": found["loss"][0],
        "last_loss": found["loss"][-1],
        # Written so that NaN fails.
        "passed": loss <= loss_limit and norm <= norm_limit,
    }


def _difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference; NaN where one is not finite."""
    found = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(found) if all(map(math.isfinite, found)) else math.nan


def time_steps(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Whole training steps, timed; then a few more, watched for what is sent and how long it takes."""
    forget(ranks.device)
    plan, device = ranks.plan, ranks.device
    left = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None
    config = run_config(job, plan)
    mesh = ranks.mesh(job)
    everyone = SingleProcess() if mesh is None else Distributed(mesh)
    step, times = timed_step(config, device, plan.steps, plan.warmup, mesh)
    if times["peak_gib"] is not None:
        times["peak_gib"] = max(everyone.all_gather(times["peak_gib"]))
    found: dict[str, Any] = {"status": "ok", **times, "left_gib": left}
    if mesh is not None:
        found |= watch(step, mesh)
    if not all(map(math.isfinite, step.losses)):
        found |= {"status": "failed", "reason": "the loss is not finite"}
    del step
    _close(mesh)
    return found


def watch(step: Step, mesh: Mesh) -> dict[str, Any]:
    """Bytes a rank sends in a step and time it spends in collectives, by axis, over a few more steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if mesh.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # All ranks are watched alike, so that none holds up the others.
    with Traffic() as traffic, torch.profiler.profile(activities=activities) as profile:
        for _ in range(_PROFILED):
            step()
        wait(mesh.device)
    sent = {axis: nbytes / _PROFILED for axis, nbytes in traffic.by_axis(mesh).items()}
    found: dict[str, Any] = {f"sent_{axis}": nbytes for axis, nbytes in sent.items()}
    if mesh.rank == 0:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
            if mesh.device.type == "cuda":
                found |= times_of_nccl(events, axis_names(mesh), _PROFILED)
            else:
                # gloo's events name no group, so only their sum is known.
                found["comm_ms"] = sum(e["dur"] for e in events if e["name"].startswith("gloo:")) / _PROFILED / 1e3
    return found


def times_of_nccl(events: list[dict[str, Any]], axes: dict[str, str], steps: int) -> dict[str, float]:
    """Milliseconds a step of a profiler's trace spends in NCCL's kernels: comm_ms, comm_exposed_ms, ms_AXIS.

    `axes` maps names of process groups to axes. The exposed part is that in which no other kernel ran. What the trace
    does not tell is left out.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    kernels = [event for event in spans if event.get("cat") == "kernel"]
    nccl = [event for event in kernels if event["name"].startswith("nccl")]
    if not nccl:
        return {}
    # Where a kernel does not name its group, the call that launched it does.
    calls = {
        event["args"]["External id"]: event["args"]
        for event in spans
        if event["name"] == "record_param_comms" and "External id" in event.get("args", {})
    }
    found = dict.fromkeys(TRAFFIC_AXES, 0.0)
    named = False
    for event in nccl:
        args = event.get("args", {})
        if "Process Group Name" not in args:
            args = calls.get(args.get("External id"), {})
        named = named or "Process Group Name" in args
        found[axes.get(str(args.get("Process Group Name")), "other")] += event["dur"]
    busy = _union((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    working = _union(
        (event["ts"], event["ts"] + event["dur"]) for event in kernels if not event["name"].startswith("nccl")
    )
    return {
        "comm_ms": sum(event["dur"] for event in nccl) / steps / 1e3,
        "comm_exposed_ms": (busy - working) / steps / 1e3,
        **({f"ms_{axis}": length / steps / 1e3 for axis, length in found.items()} if named else {}),
    }


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def longest(job: Job, ranks: Ranks) -> dict[str, Any]:
    """Double the row until a step does not fit; each length that fits is said at once, as running out ends the ranks."""
    length, fits = job.seq_len, None
    mesh = ranks.mesh(job)
    while length // job.ranks <= LONGEST:
        forget(ranks.device)
        step = Step(run_config(Job(**{**vars(job), "seq_len": length}), ranks.plan), ranks.device, mesh)
        # The first step allocates the optimizer's moments, so the second one is the larger.
        for _ in range(2):
            step()
        wait(ranks.device)
        fits = length
        if ranks.rank == 0:
            ranks.say({"job": job.name, "partial": {"longest": fits, "tried": 2 * length}})
        del step
        length *= 2
    _close(mesh)
    return {"status": "ok", "longest": fits, "tried": fits}


def _close(mesh: Mesh | None) -> None:
    if mesh is not None:
        close_mesh(mesh)


if __name__ == "__main__":
    # By its name, so that what a plugin changes in this module is changed for the run too.
    importlib.import_module("tnllm.bench.scale_rank").main(Path(sys.argv[1]))
