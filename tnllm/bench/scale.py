"""Training on 1, 2, 4 … GPUs of one machine: correctness first, then speed, memory and communication.

    plan = Plan(presets=["385m"], gpus=[1, 2], meshes=["fsdp", "tp", "sp"], device="cuda")
    results = bench_scaling(plan, on_row=print)

This process only plans, launches and reads; it never uses a GPU. For each number of GPUs one torchrun starts that many
ranks (`scale_rank`), which run that number's jobs one after another and append each result to a file. A job that ends
its ranks, out of memory or killed, becomes a row that says so, and new ranks start for the jobs after it.

Compared with one GPU of the same run, as tokens/s per GPU:

    fsdp    weak scaling: every GPU has as many rows as one GPU had
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
from itertools import chain
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
CHECK_STEPS = 10
_CHECK_TOKENS = 256
# At the usual 3e-4 a model of 1B's widths memorises its few batches in ten steps, and the loss that remains (0.008) has
# large relative differences between any two orders of summation.
_CHECK_LEARNING_RATE = 3e-5
# The search for the longest row ends beyond this many tokens per GPU.
LONGEST = 1 << 24


@dataclass(frozen=True)
class Plan:
    """What is measured. One GPU's work is `rows` of `seq_len` tokens; `longest` also searches for the longest row."""

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
    # A module that ranks import first; tests inject faults with it.
    plugin: str | None = None


@dataclass
class Job:
    """One task of the ranks: `kind` check, time or longest; `needs` names the check that must have passed."""

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
    """Sizes of the axes of a mesh such as fsdp, fsdp+tp or shard=2+sequence=4; None if it cannot have `ranks` ranks.

    With two axes and no sizes the first one gets the larger factor. Raises UserError for an unknown axis.
    """
    sizes, names = _parse_mesh(text)
    if names:
        base = round(ranks ** (1 / len(names)))
        inner = next((n for n in range(base, 0, -1) if ranks % n ** (len(names) - 1) == 0), 1)
        if ranks == 1 or (len(names) > 1 and inner == 1):
            return None
        sizes = dict.fromkeys(names, inner) | {names[0]: ranks // inner ** (len(names) - 1)}
    if math.prod(sizes.values()) != ranks or ranks == 1:
        return None
    return {axis: sizes.get(axis, 1) for axis in AXES}


def _parse_mesh(text: str) -> tuple[dict[str, int], list[str]]:
    """Axes with sizes, and axes without. Raises UserError."""
    sizes: dict[str, int] = {}
    names: list[str] = []
    for word in text.split("+"):
        name, equals, size = word.partition("=")
        axis = SHORT.get(name, name)
        if axis not in AXES or (equals and not (size.isdigit() and int(size) > 0)):
            allowed = ", ".join(SHORT)
            raise UserError(
                f"--meshes has {text!r}; write {allowed}, several axes joined by +, or sizes: "
                f"shard=2+sequence=2{did_you_mean(name, [*SHORT, *AXES])}"
            )
        if axis in sizes or axis in names:
            raise UserError(f"--meshes has {text!r}, which names {axis} twice")
        if equals:
            sizes[axis] = int(size)
        else:
            names.append(axis)
    if names and sizes:
        raise UserError(f"--meshes has {text!r}; give all axes a size, or none")
    return sizes, names


def run_config(job: Job, plan: Plan) -> RunConfig:
    """The run whose step is timed or, for a smaller model, checked. Raises UserError if model and mesh do not fit."""
    case = Case(job.preset, "transnormer", job.seq_len, job.rows, plan.activation_checkpointing)
    try:
        config = train.run_config(
            case,
            torch.device(plan.device),
            plan.compiled,
            plan.dtype,
            train.check_model(case.model) if job.kind == "check" else None,
            ParallelSection(**job.axes, timeout_s=plan.timeout_s),
        )
        if job.kind == "check":
            slow = config.optimizer.model_copy(update={"learning_rate": _CHECK_LEARNING_RATE})
            config = config.model_copy(update={"optimizer": slow})
        return config
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{job.preset} on {job.mesh}: {reason}") from None


def make_jobs(plan: Plan) -> dict[int, list[Job]]:
    """All jobs by number of GPUs, those of one GPU first. Raises UserError before anything runs."""
    alone = dict.fromkeys(AXES, 1)
    # One batch for the checks of all meshes: it divides over each of them.
    unit = math.lcm(*plan.gpus)
    checked = unit * max(1, _CHECK_TOKENS // unit), unit if unit % 2 == 0 else 2 * unit
    tokens = plan.rows * plan.seq_len
    jobs: dict[int, list[Job]] = {number: [] for number in plan.gpus}
    meshes = _meshes(plan)
    used = {axis for fitting in meshes.values() for _, axes in fitting for axis in AXES if axes[axis] > 1}
    for preset in plan.presets:
        jobs[1].append(Job(f"{preset} check {ONE}", "check", preset, ONE, alone, *checked))
        long_row = "sequence" in used and plan.rows > 1
        if used != {"sequence"} or not long_row:
            jobs[1].append(Job(f"{preset} {ONE}", "time", preset, ONE, alone, plan.seq_len, plan.rows))
        if long_row:
            jobs[1].append(Job(f"{preset} {ONE} row", "time", preset, ONE, alone, tokens, 1))
        if plan.longest:
            jobs[1].append(Job(f"{preset} longest {ONE}", "longest", preset, ONE, alone, tokens, 1))
        for number, fitting in meshes.items():
            for mesh, axes in fitting:
                check = Job(f"{preset} check {mesh} {number}", "check", preset, mesh, axes, *checked)
                copies = axes["replicate"] * axes["shard"]
                long = axes["sequence"] > 1
                shape = (tokens * axes["sequence"], copies) if long else (plan.seq_len, plan.rows * copies)
                name = f"{preset} {mesh} {number}"
                jobs[number] += [check, Job(name, "time", preset, mesh, axes, *shape, needs=check.name)]
                if plan.longest and axes["sequence"] == number:
                    name = f"{preset} longest {mesh} {number}"
                    jobs[number].append(Job(name, "longest", preset, mesh, axes, *shape, needs=check.name))
    for job in chain.from_iterable(jobs.values()):
        run_config(job, plan)
    return jobs


def _meshes(plan: Plan) -> dict[int, list[tuple[str, dict[str, int]]]]:
    """By number of GPUs: the meshes that fit it, with the sizes of their axes. Raises UserError if one fits none."""
    meshes = {number: [(m, axes) for m in plan.meshes if (axes := mesh_axes(m, number))] for number in plan.gpus}
    for mesh in plan.meshes:
        if not any(mesh == name for fitting in meshes.values() for name, _ in fitting):
            numbers = ", ".join(map(str, plan.gpus))
            raise UserError(f"--meshes has {mesh!r}, which fits none of the numbers of GPUs: --gpus is {numbers}")
    return meshes


def bench_scaling(
    plan: Plan,
    log: Callable[[str], None] = lambda text: None,
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
    model's set-up included), left_gib (allocated before the job began). Null: could not be measured.
    """
    jobs = make_jobs(plan)
    run = _Run(plan, log, on_environment, on_check, on_row)
    for number, todo in jobs.items():
        left = run.startable(todo)
        while left:
            left = run.startable(run.launch(number, left))
    return run.results


class _Run:
    """Results so far, and what is known about each check; the arguments are those of `bench_scaling`."""

    def __init__(
        self,
        plan: Plan,
        log: Callable[[str], None],
        on_environment: Callable[[dict[str, Any]], None],
        on_check: Callable[[dict[str, Any], dict[str, Any]], None],
        on_row: Callable[[dict[str, Any], dict[str, Any]], None],
    ) -> None:
        self.plan, self.log = plan, log
        self.on_environment, self.on_check, self.on_row = on_environment, on_check, on_row
        self.results: dict[str, Any] = {"environment": {}, "accuracy": [], "rows": [], "longest": []}
        self._passed: dict[str, bool] = {}
        # By preset: one GPU's losses and gradient norms, which every mesh must reproduce.
        self._expected: dict[str, dict[str, list[float]]] = {}

    def take(self, job: Job, outcome: dict[str, Any]) -> None:
        """Record a finished job."""
        row = {"preset": job.preset, "gpus": job.ranks, "mesh": job.mesh, **outcome}
        if job.kind == "check" and job.mesh == ONE:
            if "loss" in outcome:
                self._expected[job.preset] = {"loss": outcome["loss"], "norm": outcome["norm"]}
            else:
                self.log(f"{job.preset} on one GPU could not be checked ({outcome['status']}): no mesh of it is timed")
        elif job.kind == "check":
            self._passed[job.name] = bool(outcome.get("passed"))
            self.results["accuracy"].append(row)
            self.on_check(row, self.results)
        elif job.kind == "longest":
            self.results["longest"].append(row)
            self.on_row(row, self.results)
        else:
            peak = self.results["environment"].get("matmul_tflop_per_s")
            row = timed_row(job, self.plan, outcome, self.results["rows"], peak)
            self.results["rows"].append(row)
            self.on_row(row, self.results)

    def startable(self, left: list[Job]) -> list[Job]:
        """Those of the jobs `left` that can still run; a job whose check failed is recorded as wrong."""
        without_reference = []
        for job in left:
            if job.kind == "check" and job.mesh != ONE:
                job.expected = self._expected.get(job.preset)
                if job.expected is None:
                    self._passed[job.name] = False
                    without_reference.append(job)
        blocked = [job for job in left if job.needs is not None and not self._passed.get(job.needs, True)]
        for job in blocked:
            self.take(job, {"status": "wrong", "reason": "its check did not pass"})
        return [job for job in left if job not in blocked and job not in without_reference]

    def launch(self, number: int, left: list[Job]) -> list[Job]:
        """Start ranks for the jobs `left`; returns those that have no result because the ranks ended before them."""
        done: list[Job] = []
        # By job: what its ranks reported before they ended.
        partial: dict[str, dict[str, Any]] = {}
        ended = "no rank reported why"
        for event in _launch(number, left, self.plan):
            if "environment" in event:
                if not self.results["environment"]:
                    self.results["environment"] = event["environment"]
                    self.on_environment(self.results)
            elif "start" in event:
                self.log(event["start"])
            elif "ended" in event:
                ended = event["ended"]
            elif "partial" in event:
                partial[event["job"]] = event["partial"]
                self.log(f"{event['partial']['longest']} tokens fit")
            elif "failed" in event:
                partial.setdefault(event["job"], {}).update(event["failed"])
            else:
                job = next(job for job in left if job.name == event["job"])
                done.append(job)
                self.take(job, event["result"])
        left = [job for job in left if job not in done]
        if not left:
            return []
        # The ranks ended in the first job without a result.
        job, *left = left
        self.take(job, {"status": "failed", "reason": ended, **partial.get(job.name, {})})
        if "status" not in partial.get(job.name, {}):
            self.log(f"{job.name}: {ended}")
        # A search that would begin with the very case that has just failed.
        hopeless = [other for other in left if other.kind == "longest" and _same_work(other, job)]
        for search in hopeless:
            self.take(search, {"status": "failed", "reason": "its first length did not run"})
        return [other for other in left if other not in hopeless]


def _same_work(one: Job, other: Job) -> bool:
    return (one.preset, one.axes, one.seq_len, one.rows) == (other.preset, other.axes, other.seq_len, other.rows)


def timed_row(
    job: Job, plan: Plan, outcome: dict[str, Any], before: list[dict[str, Any]], peak: float | None
) -> dict[str, Any]:
    """A row of results from what the ranks reported, with the efficiency against the rows `before`."""
    config = run_config(job, plan)
    tokens = job.rows * job.seq_len
    names = ["step_ms", "low_ms", "high_ms", "tokens_per_s", "per_gpu", "efficiency", "base_gpus", "mfu", "peak_gib"]
    names += ["comm_ms", "comm_exposed_ms"]
    names += [f"{what}_{axis}" for what in ("ms", "sent") for axis in TRAFFIC_AXES]
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
        **outcome,
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
    """The row of one GPU with the same work; if that did not run, the same mesh on the fewest GPUs."""
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
    """Start `number` ranks for `jobs` and yield their events as they come, then why they ended, if they failed."""
    with tempfile.TemporaryDirectory(prefix="tnllm-scale-") as name:
        folder = Path(name)
        task, events, log = folder / "task.json", folder / "events.jsonl", folder / "log.txt"
        task.write_text(
            json.dumps({"plan": asdict(plan), "jobs": [asdict(job) for job in jobs], "events": str(events)})
        )
        events.touch()
        environment = dict(os.environ)
        # Ranks on a CPU share its cores, with the same number of threads in every job.
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
                last, rest = time.monotonic(), ""
                while True:
                    ended = process.poll() is not None
                    rest += lines.read()
                    *complete, rest = rest.split("\n")
                    for line in complete:
                        last = time.monotonic()
                        yield json.loads(line)
                    if ended:
                        break
                    if not complete and time.monotonic() - last > plan.timeout_s + 30:
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
            yield {"ended": f"the ranks reported nothing for {plan.timeout_s:g} s (--timeout-s)"}
        elif process.returncode:
            yield {"ended": _why(log.read_text(errors="replace"), process.returncode)}


def _why(log: str, code: int) -> str:
    """What torchrun's log says about the rank that failed first."""
    ended = re.findall(r"rank\s*: (\d+) \(local_rank: \d+\)\s*exitcode\s*: (-?\d+)", log)
    # torchrun ends the other ranks by SIGTERM.
    lost = [(rank, -int(number)) for rank, number in ended if int(number) < 0 and -int(number) != signal.SIGTERM]
    if lost:
        return f"rank {lost[0][0]} was lost ({signal.Signals(lost[0][1]).name})"
    errors = [
        line.strip() for line in log.splitlines() if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|tnllm): ", line)
    ]
    return errors[0] if errors else f"the ranks ended with exit code {code}"
