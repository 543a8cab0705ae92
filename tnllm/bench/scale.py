"""Training on 1, 2, 4 … GPUs of one machine: correctness first, then speed, memory and what ranks send each other.

    plan = Plan(presets=["385m"], gpus=[1, 2], meshes=["fsdp", "tp", "sp"], device="cuda")
    results = bench_scaling(plan, on_row=print)

This process only plans, starts and reads; it never touches a GPU. For each number of GPUs one torchrun starts that many
ranks (`scale_rank`), which run that number's cases one after another and append each result to a file. A case that
ends its ranks, out of memory or killed, becomes a row that says so, and ranks start again for the cases after it.

What is compared with one GPU of the same run, as tokens/s per GPU:

    fsdp    weak scaling: every GPU has its own rows, as many as one GPU had
    sp      weak scaling: one row, whose length grows with the GPUs; one GPU's is `rows * seq_len` tokens
    tp      strong scaling: the tokens of one GPU, split
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from tnllm.bench import train
from tnllm.bench.train import Case
from tnllm.errors import UserError, did_you_mean
from tnllm.modeling.flops import flops_per_token
from tnllm.parallel.mesh import AXES
from tnllm.parallel.traffic import TRAFFIC_AXES
from tnllm.training.communication import communication
from tnllm.training.config import ParallelSection, RunConfig

# Short name → the axis of the mesh.
SHORT = {"fsdp": "shard", "sp": "sequence", "tp": "tensor", "ddp": "replicate"}
ONE = "one"
GATE_STEPS = 10
_GATE_TOKENS = 256
# At the usual 3e-4 a model of 1B's widths learns its few batches by heart in ten steps, and the loss that is left (0.008)
# differs by parts of itself between any two orders of summation.
_GATE_LEARNING_RATE = 3e-5
# A search for the longest row gives up beyond this many tokens a GPU.
LONGEST = 1 << 24


@dataclass(frozen=True)
class Plan:
    """What is measured. `rows` of `seq_len` tokens is the work of one GPU; `longest` also searches the longest row."""

    presets: list[str]
    gpus: list[int]
    meshes: list[str]
    device: str
    seq_len: int = 4096
    rows: int = 8
    activation_checkpointing: str = "none"
    dtype: str = "auto"
    compiled: bool = True
    steps: int = 10
    warmup: int = 3
    longest: bool = False
    timeout_s: float = 300
    # Ranks import this module first; tests break something with it.
    plugin: str | None = None


@dataclass
class Job:
    """One thing that ranks do: `kind` gate, time or longest; `needs` is the gate that must have passed."""

    name: str
    kind: str
    preset: str
    mesh: str
    axes: dict[str, int]
    seq_len: int
    rows: int
    needs: str | None = None
    expected: dict[str, list[float]] | None = field(default=None)

    @property
    def ranks(self) -> int:
        """Number of GPUs."""
        return math.prod(self.axes.values())


def mesh_axes(text: str, ranks: int) -> dict[str, int] | None:
    """Sizes of the axes of a mesh such as fsdp, fsdp+tp or shard=2+sequence=4; None where it has no `ranks` ranks.

    With two axes and no sizes the first one gets the larger half. Raises UserError for an unknown axis.
    """
    sizes: dict[str, int] = {}
    names = []
    for part in text.split("+"):
        name, given, size = part.partition("=")
        axis = SHORT.get(name, name)
        if axis not in AXES or (given and not (size.isdigit() and int(size) > 0)):
            allowed = ", ".join(SHORT)
            raise UserError(
                f"--meshes has {text!r}; write {allowed}, joined by + where there are several axes, or sizes: "
                f"shard=2+sequence=2{did_you_mean(name, [*SHORT, *AXES])}"
            )
        if axis in sizes or axis in names:
            raise UserError(f"--meshes has {text!r}, which names {axis} twice")
        if given:
            sizes[axis] = int(size)
        else:
            names.append(axis)
    if names and sizes:
        raise UserError(f"--meshes has {text!r}; give all axes a size, or none")
    if names:
        base = round(ranks ** (1 / len(names)))
        inner = next((n for n in range(base, 0, -1) if ranks % n ** (len(names) - 1) == 0), 1)
        if ranks == 1 or (len(names) > 1 and inner == 1):
            return None
        sizes = dict.fromkeys(names, inner) | {names[0]: ranks // inner ** (len(names) - 1)}
    if math.prod(sizes.values()) != ranks or ranks == 1:
        return None
    return {axis: sizes.get(axis, 1) for axis in AXES}


def run_config(job: Job, plan: Plan) -> RunConfig:
    """The run whose step is timed or, of a smaller model, checked. Raises UserError where model and mesh do not fit."""
    case = Case(job.preset, "transnormer", job.seq_len, job.rows, plan.activation_checkpointing)
    try:
        config = train.run_config(
            case,
            torch.device(plan.device),
            plan.compiled,
            plan.dtype,
            train.gate_model(case.model) if job.kind == "gate" else None,
            ParallelSection(**job.axes, timeout_s=plan.timeout_s),
        )
        if job.kind == "gate":
            slow = config.optimizer.model_copy(update={"learning_rate": _GATE_LEARNING_RATE})
            config = config.model_copy(update={"optimizer": slow})
        return config
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{job.preset} on {job.mesh}: {reason}") from None


def make_jobs(plan: Plan) -> dict[int, list[Job]]:
    """All jobs by number of GPUs, those of one GPU first. Raises UserError before anything runs."""
    alone = dict.fromkeys(AXES, 1)
    # One batch for the check of all meshes: it divides over each of them.
    unit = math.lcm(*plan.gpus)
    gate = unit * max(1, _GATE_TOKENS // unit), unit if unit % 2 == 0 else 2 * unit
    tokens = plan.rows * plan.seq_len
    jobs: dict[int, list[Job]] = {number: [] for number in plan.gpus}
    meshes = {number: [(m, axes) for m in plan.meshes if (axes := mesh_axes(m, number))] for number in plan.gpus}
    for mesh in plan.meshes:
        if not any(mesh == name for found in meshes.values() for name, _ in found):
            numbers = ", ".join(map(str, plan.gpus))
            raise UserError(f"--meshes has {mesh!r}, which fits none of the numbers of GPUs: --gpus is {numbers}")
    used = {axis for found in meshes.values() for _, axes in found for axis in AXES if axes[axis] > 1}
    for preset in plan.presets:
        reference = Job(f"{preset} gate {ONE}", "gate", preset, ONE, alone, *gate)
        jobs[1].append(reference)
        if used - {"sequence"} or not used:
            jobs[1].append(Job(f"{preset} {ONE}", "time", preset, ONE, alone, plan.seq_len, plan.rows))
        if "sequence" in used and plan.rows > 1:
            jobs[1].append(Job(f"{preset} {ONE} row", "time", preset, ONE, alone, tokens, 1))
        elif "sequence" in used and not used - {"sequence"}:
            jobs[1].append(Job(f"{preset} {ONE}", "time", preset, ONE, alone, plan.seq_len, plan.rows))
        if plan.longest:
            jobs[1].append(Job(f"{preset} longest {ONE}", "longest", preset, ONE, alone, tokens, 1))
        for number, found in meshes.items():
            for mesh, axes in found:
                check = Job(f"{preset} gate {mesh} {number}", "gate", preset, mesh, axes, *gate)
                copies = axes["replicate"] * axes["shard"]
                shape = (
                    (tokens * axes["sequence"], copies) if axes["sequence"] > 1 else (plan.seq_len, plan.rows * copies)
                )
                jobs[number] += [
                    check,
                    Job(f"{preset} {mesh} {number}", "time", preset, mesh, axes, *shape, needs=check.name),
                ]
                if plan.longest and axes["sequence"] == number:
                    name = f"{preset} longest {mesh} {number}"
                    jobs[number].append(Job(name, "longest", preset, mesh, axes, *shape, needs=check.name))
    for job in (job for part in jobs.values() for job in part):
        run_config(job, plan)
    return jobs


def bench_scaling(
    plan: Plan,
    note: Callable[[str], None] = lambda text: None,
    on_environment: Callable[[dict[str, Any]], None] = lambda results: None,
    on_check: Callable[[dict[str, Any], dict[str, Any]], None] = lambda row, results: None,
    on_row: Callable[[dict[str, Any], dict[str, Any]], None] = lambda row, results: None,
) -> dict[str, Any]:
    """Run the plan. Returns {"environment", "accuracy": [...], "rows": [...], "longest": [...]}, all plain values.

    A row of `rows`: preset, gpus, mesh and its axes, seq_len, rows, tokens, scaling; status ("ok", "out of memory",
    "wrong", "failed") and reason; step_ms (median; low_ms, high_ms: 20th and 80th percentile), tokens_per_s,
    per_gpu (tokens/s and GPU), efficiency (per_gpu over that of `base_gpus` GPUs), mfu, peak_gib (the largest of all
    ranks, allocated by torch in steady steps), comm_ms and comm_exposed_ms (a step's time in collectives, waiting for
    other ranks included; and that part of it in which nothing else ran), ms_AXIS and sent_AXIS (bytes a rank sends in a
    step, counted), computed_bytes (the same by formula), compile_s (what the first step took beyond a steady one, the
    model's set-up included), left_gib (allocated before the case began). Null where it could not be measured.
    """
    jobs = make_jobs(plan)
    results: dict[str, Any] = {"environment": {}, "accuracy": [], "rows": [], "longest": []}
    passed: dict[str, bool] = {}
    expected: dict[str, dict[str, list[float]]] = {}

    def take(job: Job, found: dict[str, Any]) -> None:
        """One finished job."""
        if job.kind == "gate":
            if job.mesh == ONE:
                if "loss" in found:
                    expected[job.preset] = {"loss": found["loss"], "norm": found["norm"]}
                else:
                    note(f"{job.preset} on one GPU could not be checked ({found['status']}): no mesh of it is timed")
                return
            passed[job.name] = bool(found.get("passed"))
            row = {"preset": job.preset, "gpus": job.ranks, "mesh": job.mesh, **found}
            results["accuracy"].append(row)
            on_check(row, results)
        elif job.kind == "longest":
            row = {"preset": job.preset, "gpus": job.ranks, "mesh": job.mesh, **found}
            results["longest"].append(row)
            on_row(row, results)
        else:
            row = timed_row(job, plan, found, results["rows"], results["environment"].get("matmul_tflop_per_s"))
            results["rows"].append(row)
            on_row(row, results)

    for number, todo in jobs.items():
        left = list(todo)
        while left:
            for job in [job for job in left if job.kind == "gate" and job.mesh != ONE]:
                job.expected = expected.get(job.preset)
                if job.expected is None:
                    passed[job.name] = False
            ready = [job for job in left if _ready(job, passed)]
            for job in left:
                if job not in ready:
                    take(job, {"status": "wrong", "reason": "its check was not passed"})
            left = [job for job in ready if not (job.kind == "gate" and job.mesh != ONE and job.expected is None)]
            if not left:
                break
            done: list[Job] = []
            kept: dict[str, dict[str, Any]] = {}
            ended = "no rank said why"
            for event in _launch(number, left, plan):
                if "environment" in event:
                    if not results["environment"]:
                        results["environment"] = event["environment"]
                        on_environment(results)
                elif "start" in event:
                    note(event["start"])
                elif "ended" in event:
                    ended = event["ended"]
                elif "partial" in event:
                    kept[event["job"]] = event["partial"]
                    note(f"{event['partial']['longest']} tokens fit")
                elif "failed" in event:
                    kept.setdefault(event["job"], {}).update(event["failed"])
                else:
                    job = next(job for job in left if job.name == event["job"])
                    done.append(job)
                    take(job, event["result"])
            left = [job for job in left if job not in done]
            if left:
                # The first that has no result is the one the ranks died in.
                job = left.pop(0)
                take(job, {"status": "failed", "reason": ended, **kept.get(job.name, {})})
                if "status" not in kept.get(job.name, {}):
                    note(f"{job.name}: {ended}")
                for search in [other for other in left if other.kind == "longest" and _same_work(other, job)]:
                    # It would begin with what has just failed.
                    take(search, {"status": "failed", "reason": "its first length did not run"})
                    left.remove(search)
    return results


def _ready(job: Job, passed: dict[str, bool]) -> bool:
    return job.needs is None or passed.get(job.needs, True)


def _same_work(one: Job, other: Job) -> bool:
    return (one.preset, one.axes, one.seq_len, one.rows) == (other.preset, other.axes, other.seq_len, other.rows)


def timed_row(
    job: Job, plan: Plan, found: dict[str, Any], before: list[dict[str, Any]], peak: float | None
) -> dict[str, Any]:
    """A row of results from what the ranks found, with the efficiency against the rows `before`."""
    config = run_config(job, plan)
    tokens = job.rows * job.seq_len
    names: tuple[str, ...] = (
        "step_ms",
        "low_ms",
        "high_ms",
        "tokens_per_s",
        "per_gpu",
        "efficiency",
        "base_gpus",
        "mfu",
        "peak_gib",
    )
    names += ("comm_ms", "comm_exposed_ms", *(f"{what}_{axis}" for what in ("ms", "sent") for axis in TRAFFIC_AXES))
    row: dict[str, Any] = {
        "preset": job.preset,
        "gpus": job.ranks,
        "mesh": job.mesh,
        **job.axes,
        "seq_len": job.seq_len,
        "rows": job.rows,
        "tokens": tokens,
        "scaling": scaling(job.axes),
        "activation_checkpointing": plan.activation_checkpointing,
        "status": "failed",
        "reason": "",
        **dict.fromkeys(names),
        "computed_bytes": sum(communication(config, plan.device == "cuda" and plan.dtype != "fp32").values()),
        "compile_s": None,
        "left_gib": None,
        **found,
    }
    if row["status"] != "ok":
        return row
    row["tokens_per_s"] = tokens / (row["step_ms"] / 1e3)
    row["per_gpu"] = row["tokens_per_s"] / job.ranks
    if peak is not None:
        row["mfu"] = row["per_gpu"] * flops_per_token(config.model, job.seq_len) / (peak * 1e12)
    base = _base(row, [*before, row])
    row["base_gpus"], row["efficiency"] = base["gpus"], row["per_gpu"] / base["per_gpu"]
    return row


def _base(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One GPU with the same work; where that did not run, the same mesh on the fewest GPUs."""
    done = [other for other in rows if other["status"] == "ok" and other["preset"] == row["preset"]]
    alone = [other for other in done if other["mesh"] == ONE]
    if row["mesh"] == ONE:
        return row
    long = row["sequence"] > 1
    same = [other for other in alone if (other["rows"] == 1) == long] or (alone if long else [])
    return same[0] if same else next(other for other in done if other["mesh"] == row["mesh"])


def scaling(axes: dict[str, int]) -> str:
    """Which scaling a mesh shows."""
    weak = [
        word for word, on in (("rows", axes["replicate"] * axes["shard"] > 1), ("length", axes["sequence"] > 1)) if on
    ]
    parts = [f"weak ({' and '.join(weak)})"] if weak else []
    return " x ".join([*parts, "strong"]) if axes["tensor"] > 1 else (parts[0] if parts else "-")


def _launch(number: int, jobs: list[Job], plan: Plan) -> Iterator[dict[str, Any]]:
    """Start `number` ranks for `jobs` and yield what they write, as they write it; then how they ended, if badly."""
    with tempfile.TemporaryDirectory(prefix="tnllm-scale-") as name:
        folder = Path(name)
        task, events, log = folder / "task.json", folder / "events.jsonl", folder / "log.txt"
        task.write_text(
            json.dumps({"plan": asdict(plan), "jobs": [asdict(job) for job in jobs], "events": str(events)})
        )
        events.touch()
        environment = dict(os.environ)
        # Ranks of a CPU share its cores alike, however many they are.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(plan.gpus))))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
        with open(log, "w") as output:
            process = subprocess.Popen(
                [*command, "-m", "tnllm.bench.scale_rank", str(task)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        silent = False
        try:
            with open(events) as lines:
                last, part = time.monotonic(), ""
                while True:
                    over = process.poll() is not None
                    part += lines.read()
                    *whole, part = part.split("\n")
                    for line in whole:
                        last = time.monotonic()
                        yield json.loads(line)
                    if over:
                        break
                    if not whole and time.monotonic() - last > plan.timeout_s + 30:
                        silent = True
                        break
                    time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(45)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if silent:
            yield {"ended": f"nothing was heard from the ranks for {plan.timeout_s:g} s (--timeout-s)"}
        elif process.returncode:
            yield {"ended": _why(log.read_text(errors="replace"), process.returncode)}


def _why(log: str, code: int) -> str:
    """What torchrun's log says about the rank that failed first."""
    ended = re.findall(r"rank\s*: (\d+) \(local_rank: \d+\)\s*exitcode\s*: (-?\d+)", log)
    # SIGTERM is how torchrun stops the ranks that were still well.
    lost = [(rank, -int(number)) for rank, number in ended if int(number) < 0 and -int(number) != signal.SIGTERM]
    if lost:
        return f"rank {lost[0][0]} was lost ({signal.Signals(lost[0][1]).name})"
    told = [
        line.strip() for line in log.splitlines() if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|tnllm): ", line)
    ]
    return told[0] if told else f"the ranks ended with exit code {code}"
