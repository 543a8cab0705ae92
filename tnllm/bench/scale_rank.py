"""One rank of a case of `bench_scaling`: torchrun runs it as `python -m tnllm.bench.scale_rank CASE.part`, not people.

The file says what to measure, and rank 0 adds what came of each phase. A rank that fails records the reason for torchrun
and exits at once: the others may wait for it in a collective, so torchrun stops them.
"""

import faulthandler
import json
import math
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Ctrl-C ends a rank without a traceback, also while it imports torch.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from tnllm.bench.scale import CHECK_STEPS, LONGEST, ONE, MeshCase, Plan, run_config
from tnllm.bench.timing import synchronize
from tnllm.bench.train import Step, reset, step_environment, timed_step
from tnllm.files import write_text_atomic
from tnllm.parallel.mesh import Mesh, close_mesh, open_mesh
from tnllm.parallel.ranks import Distributed, SingleProcess
from tnllm.parallel.traffic import TRAFFIC_AXES, Traffic, axis_names
from tnllm.training.config import RunConfig
from tnllm.training.launch import is_lost_rank
from tnllm.training.metrics import matmul_rate
from tnllm.training.trainer import compute_dtype

# Largest relative difference of a loss, and of a gradient's norm, from one GPU's in any of ten steps. fp32: sums in
# another order, as in tests/parallel. bf16: a mesh rounds other partial sums to 8 bits, and ten updates propagate that;
# measured 9e-5 and 1.1e-4 (widths of 385m and 1b, two H100): docs/parallel.md.
LIMITS = {torch.float32: (2e-5, 5e-4), torch.bfloat16: (1e-3, 2e-3)}
_PROFILED = 2


def main(path: Path) -> None:
    """Run the case in the file `path`."""
    results = json.loads(path.read_text())
    plan, rank = Plan(**results["plan"]), int(os.environ["RANK"])
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    with open(path.with_suffix(f".{rank}.log"), "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)

    def report(line: str = "", **measured: Any) -> None:
        # Ends a rank that reports nothing for too long, with its stack in the log; a collective should time out before.
        faulthandler.dump_traceback_later(plan.timeout_s + 30, exit=True)
        if rank == 0:
            results.update(measured)
            write_text_atomic(path, json.dumps(results))
            print(line, file=terminal, end="\n" if line else "")

    try:
        _run(MeshCase(**results["case"]), plan, results["expected"], report)
    except Exception as error:  # any failure costs this case only
        get_error_handler().record_exception(error)
        traceback.print_exc()
        sys.stderr.flush()
        # Without waiting for collectives that will never complete. A lost connection is another rank's failure.
        full = isinstance(error, torch.OutOfMemoryError)
        os._exit(2 if isinstance(error, RuntimeError) and not full and is_lost_rank(error) else 1)


def _run(case: MeshCase, plan: Plan, expected: dict[str, list[float]] | None, report: Callable[..., None]) -> None:
    report()
    device = torch.device(plan.device)
    if plan.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    environment = step_environment(run_config(case, plan).train, device, matmul_rate(device), plan.steps, plan.warmup)
    if plan.device == "cuda":
        environment["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    report(environment=environment)
    mesh = None
    if case.mesh != ONE:
        mesh = open_mesh(**case.axes, device_type=plan.device, timeout_s=plan.timeout_s)
    for phase in case.phases:
        reset(device)
        config = run_config(case, plan, phase)
        if phase == "check":
            measured = check(Step(config, device, mesh), expected)
        elif phase == "time":
            measured = time_steps(config, plan, device, mesh)
        else:
            measured = longest(case, plan, device, mesh, report)
        report(**{phase: measured})
        if not measured.get("passed", True):
            break
    if mesh is not None:
        close_mesh(mesh)


def check(step: Step, expected: dict[str, list[float]] | None) -> dict[str, Any]:
    """Ten steps of a small model in the precision that will be timed; losses and norms are compared with `expected`."""
    for _ in range(CHECK_STEPS):
        step()
    measured = step.measured
    if expected is None:
        return {"status": "ok", **measured}
    loss, norm = (_difference(measured[key], expected[key]) for key in ("loss", "norm"))
    loss_limit, norm_limit = LIMITS[compute_dtype(step.trainer.config.train, step.trainer.device)]
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


def time_steps(config: RunConfig, plan: Plan, device: torch.device, mesh: Mesh | None) -> dict[str, Any]:
    """Full training steps, timed; then a few more under the profiler, to measure communication."""
    left = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None
    everyone = SingleProcess() if mesh is None else Distributed(mesh)
    step, times = timed_step(config, device, plan.steps, plan.warmup, mesh)
    if times["peak_gib"] is not None:
        times["peak_gib"] = max(everyone.all_gather(times["peak_gib"]))
    result: dict[str, Any] = {"status": "ok", **times, "left_gib": left}
    if mesh is not None:
        result |= profile_communication(step, mesh)
    if not all(map(math.isfinite, step.measured["loss"])):
        result |= {"status": "failed", "reason": "the loss is not finite"}
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
    busy = _union(kernels)
    working = _union(event for event in kernels if not event["name"].startswith("nccl"))
    return {
        "comm_ms": sum(event["dur"] for event in nccl) / steps / 1e3,
        "comm_exposed_ms": (busy - working) / steps / 1e3,
        **({f"ms_{axis}": duration / steps / 1e3 for axis, duration in durations.items()} if named else {}),
    }


def _union(events: Iterable[dict[str, Any]]) -> float:
    total, end = 0.0, -math.inf
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def longest(
    case: MeshCase, plan: Plan, device: torch.device, mesh: Mesh | None, report: Callable[..., None]
) -> dict[str, Any]:
    """Double the row until a step does not fit; each length that fits is reported at once, as an OOM ends the ranks."""
    length, fits = case.seq_len, None
    while length // case.ranks <= LONGEST:
        reset(device)
        step = Step(run_config(replace(case, seq_len=length), plan), device, mesh)
        # The first step allocates the optimizer's moments, so the second one is the larger.
        for _ in range(2):
            step()
        synchronize(device)
        fits = length
        report(f"{fits} tokens fit", longest={"longest": fits, "tried": 2 * length})
        del step
        length *= 2
    return {"status": "ok", "longest": fits, "tried": fits}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
