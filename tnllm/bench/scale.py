"""Training on 1, 2, 4 … GPUs of one machine: correctness first, then speed, memory and communication.

    plan = Plan(presets=["385m"], gpus=[1, 2], meshes=["fsdp", "tp", "sp"], device="cuda")
    results = bench_scaling(plan, on_row=print)

This process only plans, launches and reads; it never uses a GPU. Each case, a preset on a mesh, is one torchrun of
`scale_rank` and one JSON file: its check, its timed steps and its search for the longest row. A case whose ranks end
early, out of memory or killed, becomes a row that says so.

Compared with one GPU of the same run, as tokens/s per GPU:

    fsdp    weak scaling: every GPU has as many rows as one GPU had
    sp      weak scaling: one row, whose length grows with the GPUs; one GPU's is `rows * seq_len` tokens
    tp      strong scaling: the tokens of one GPU, split
"""

import glob
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tnllm import __version__
from tnllm.bench import train
from tnllm.bench.budget import Budget
from tnllm.bench.train import Case
from tnllm.errors import UserError, did_you_mean
from tnllm.files import read_json, write_text_atomic
from tnllm.modeling.config import get_preset
from tnllm.modeling.flops import flops_per_token
from tnllm.parallel.mesh import AXES
from tnllm.parallel.traffic import TRAFFIC_AXES
from tnllm.training.config import RunConfig
from tnllm.training.estimate import communication
from tnllm.training.launch import torchrun
from tnllm.training.sections import ParallelSection

# Short name → the axis of the mesh.
SHORT = {"fsdp": "shard", "sp": "sequence", "tp": "tensor", "ddp": "replicate"}
ONE = "one"
CHECK_STEPS = 10
# At the usual 3e-4 a model of 1B's widths memorises its few batches in ten steps, and the loss that remains (0.008) has
# large relative differences between any two orders of summation.
_CHECK_LEARNING_RATE = 3e-5
# The search for the longest row ends beyond this many tokens per GPU.
LONGEST = 1 << 24
# What becomes of a phase that could not run after the one before it.
_WRONG = {"status": "wrong", "reason": "its check did not pass"}
_NOT_RUN = {"status": "failed", "reason": "its first length did not run"}


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
    # Tokens in a row of the check, or fewer, so that it divides over every mesh.
    check_tokens: int = 256


@dataclass(frozen=True)
class MeshCase:
    """One torchrun: a preset on a mesh, `rows` rows of `seq_len` tokens, and its phases: check, time, longest.

    `checked`: tokens in a row, and rows, of the check.
    """

    preset: str
    mesh: str
    axes: dict[str, int]
    seq_len: int
    rows: int
    phases: list[str]
    checked: list[int]

    @property
    def ranks(self) -> int:
        return math.prod(self.axes.values())

    @property
    def name(self) -> str:
        return "-".join([self.preset, self.mesh, str(self.ranks), *self.phases])

    @property
    def title(self) -> str:
        where = "one GPU" if self.mesh == ONE else f"{self.mesh} on {self.ranks}"
        return f"{self.preset}, {where}, {self.rows} x {self.seq_len} tokens ({', '.join(self.phases)})"


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


def run_config(case: MeshCase, plan: Plan, phase: str = "time") -> RunConfig:
    """The run whose step is timed or, for a smaller model, checked. Raises UserError if model and mesh do not fit."""
    seq_len, rows = case.checked if phase == "check" else (case.seq_len, case.rows)
    step = Case(case.preset, "transnormer", seq_len, rows, plan.activation_checkpointing)
    try:
        small = train.check_model(step.model) if phase == "check" else None
        mesh = ParallelSection(**case.axes, timeout_s=plan.timeout_s)
        config = train.run_config(step, torch.device(plan.device), plan.compiled, plan.dtype, small, mesh)
        if phase == "check":
            slow = config.optimizer.model_copy(update={"learning_rate": _CHECK_LEARNING_RATE})
            config = config.model_copy(update={"optimizer": slow})
        return config
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{case.preset} on {case.mesh}: {reason}") from None


def make_cases(plan: Plan) -> list[MeshCase]:
    """All cases, those of one GPU first. Raises UserError before anything runs."""
    alone = dict.fromkeys(AXES, 1)
    # One batch for the checks of all meshes: it divides over each of them.
    unit = math.lcm(*plan.gpus)
    checked = [unit * max(1, plan.check_tokens // unit), unit if unit % 2 == 0 else 2 * unit]
    tokens = plan.rows * plan.seq_len
    by_number: dict[int, list[MeshCase]] = {number: [] for number in plan.gpus}
    meshes = _meshes(plan)
    used = {axis for fitting in meshes.values() for _, axes in fitting for axis in AXES if axes[axis] > 1}
    for preset in plan.presets:
        long_row = "sequence" in used and plan.rows > 1
        short = ["check"] if used == {"sequence"} and long_row else ["check", "time"]
        row = ["time"] * long_row + ["longest"] * plan.longest
        by_number[1].append(MeshCase(preset, ONE, alone, plan.seq_len, plan.rows, short, checked))
        if row:
            by_number[1].append(MeshCase(preset, ONE, alone, tokens, 1, row, checked))
        for number, fitting in meshes.items():
            for mesh, axes in fitting:
                copies = axes["replicate"] * axes["shard"]
                long = axes["sequence"] > 1
                shape = (tokens * axes["sequence"], copies) if long else (plan.seq_len, plan.rows * copies)
                phases = ["check", "time"] + ["longest"] * (plan.longest and axes["sequence"] == number)
                by_number[number].append(MeshCase(preset, mesh, axes, *shape, phases, checked))
    cases = list(chain.from_iterable(by_number.values()))
    for case in cases:
        for phase in case.phases:
            run_config(case, plan, phase)
    return cases


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
    on_row: Callable[[str, dict[str, Any], dict[str, Any]], None] = lambda kind, row, results: None,
    folder: Path | None = None,
    module: str = "tnllm.bench.scale_rank",
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Run the plan. Returns {"environment", "accuracy": [...], "rows": [...], "longest": [...]}, all plain values.

    `on_row` gets the key of each row as it comes, the row, and the results so far. `folder` keeps each finished case as a
    JSON file: a plan that was interrupted skips those when it is run again. Once no case is left that failed, the files
    are removed. `module` is what each rank runs. `budget`: minutes for all; a case that is forecast not to fit, from
    the time of the cases of its preset before it, is skipped.

    A row of `rows`: preset, gpus, mesh and its axes, seq_len, rows, tokens, scaling; status ("ok", "out of memory",
    "wrong", "failed") and reason; step_ms (median; low_ms, high_ms: 20th and 80th percentile), tokens_per_s, per_gpu
    (tokens/s and GPU), efficiency (per_gpu over that of `base_gpus` GPUs), mfu, mfu_sheet, peak_gib (the largest of all
    ranks, allocated by torch in steady steps), comm_ms and comm_exposed_ms (a step's time in collectives, waiting for
    other ranks included; and that part of it in which nothing else ran), ms_AXIS and sent_AXIS (bytes a rank sends in a
    step, counted), computed_bytes (the same by formula), compile_s (what the first step took beyond a steady one, the
    model's set-up included), left_gib (allocated before the timing began). Null: could not be measured.
    """
    cases = make_cases(plan)
    budget = budget or Budget(log=log)
    # Ranks on a CPU share its cores, with the same number of threads in every case.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(plan.gpus))))
    results: dict[str, Any] = {"environment": {}, "accuracy": [], "rows": [], "longest": []}
    # By preset: one GPU's losses and gradient norms, which every mesh must reproduce.
    expected: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="tnllm-scale-") as temporary, budget:
        kept = folder or Path(temporary)
        kept.mkdir(exist_ok=True)
        for case in cases:
            outcome = _outcome(case, plan, expected.get(case.preset), kept, module, budget)
            if not results["environment"] and "environment" in outcome:
                results["environment"] = outcome["environment"]
                on_row("environment", results["environment"], results)
            for phase in case.phases:
                row = {"preset": case.preset, "gpus": case.ranks, "mesh": case.mesh, **outcome[phase]}
                if phase == "check" and case.mesh == ONE:
                    if row["status"] == "ok":
                        expected[case.preset] = {"loss": row["loss"], "norm": row["norm"]}
                    else:
                        log(f"{case.preset} on one GPU could not be checked ({row['status']}): no mesh of it is timed")
                    continue
                if phase == "time":
                    row = timed_row(case, plan, outcome[phase], results["rows"], results["environment"])
                kind = {"check": "accuracy", "time": "rows", "longest": "longest"}[phase]
                results[kind].append(row)
                on_row(kind, row, results)
        if all((kept / f"{case.name}.json").exists() for case in cases):
            for file in chain.from_iterable(kept.glob(f"{glob.escape(case.name)}.*") for case in cases):
                file.unlink()
            with suppress(OSError):
                kept.rmdir()
    return results


def _outcome(
    case: MeshCase, plan: Plan, expected: dict[str, list[float]] | None, folder: Path, module: str, budget: Budget
) -> dict[str, Any]:
    """By phase, what came of a case, read from its JSON file or measured by new ranks; every phase has a status."""
    finished, running = folder / f"{case.name}.json", folder / f"{case.name}.part"
    settings = asdict(replace(plan, presets=[], gpus=[], meshes=[], longest=False))
    asked = {"version": [__version__, torch.__version__], "plan": settings, "case": asdict(case), "expected": expected}
    if finished.exists():
        outcome = read_json(finished)
        if asked.items() <= outcome.items():
            budget.log(f"{case.title}: measured before ({finished})")
            return outcome
        finished.unlink()
    work = case.rows * case.seq_len * flops_per_token(get_preset(case.preset), case.seq_len)
    # GPUs share a step's work, processes on a CPU only its cores.
    work /= case.ranks if plan.device == "cuda" else 1
    seconds = budget.forecast(case.preset, work)
    if not budget.allows(case.title, seconds):
        return {phase: {"status": "skipped", "reason": budget.refusal(seconds or 0.0)} for phase in case.phases}
    running.write_text(json.dumps(asked))
    started, failure = time.monotonic(), _WRONG
    if "check" not in case.phases or case.mesh == ONE or expected is not None:
        try:
            torchrun([module, str(running)], case.ranks)
        except ChildFailedError as error:
            status, reason = _failure(error, plan.timeout_s if time.monotonic() - started > plan.timeout_s else None)
            failure = {"status": status, "reason": reason}
            if status == "failed":
                budget.log(f"{case.title}: {reason}")
        except SignalException as stopped:
            raise KeyboardInterrupt if stopped.sigval == signal.SIGINT else SystemExit(128 + stopped.sigval) from None
    if case.ranks > 1 or "check" in case.phases:
        budget.learn(case.preset, work, time.monotonic() - started)
    outcome = json.loads(running.read_text())
    for phase in case.phases:
        measured = outcome.setdefault(phase, {})
        if "status" not in measured:
            measured |= failure
            failure = _WRONG if phase == "check" or failure is _WRONG else _NOT_RUN
    # One that failed is measured again when the plan is run again.
    if all(outcome[phase] == _NOT_RUN or outcome[phase]["status"] != "failed" for phase in case.phases):
        write_text_atomic(finished, json.dumps(outcome))
    return outcome


def _failure(error: ChildFailedError, silent_s: float | None) -> tuple[str, str]:
    """Status and reason of a case whose ranks ended early: the first rank with an error of its own, else one killed."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int, int]:
        code = item[1].exitcode
        # torchrun stops the others by SIGTERM.
        return code != 1, code == -signal.SIGTERM, code, item[1].timestamp

    rank, first = min(error.failures.items(), key=order)
    if first.exitcode < 0:
        return "failed", f"rank {rank} was lost ({first.signal_name()})"
    if not isinstance(first.message, dict):
        if silent_s is not None:
            return "failed", f"the ranks reported nothing for {silent_s:g} s (--timeout-s)"
        return "failed", f"the ranks ended with exit code {first.exitcode}"
    line, *more = first.message["message"].strip().splitlines()
    # A compiler's first line says where, its last line why.
    line = f"{line} {more[-1].strip()}" if line.endswith(":") and more else line
    return "out of memory" if line.startswith("OutOfMemoryError") else "failed", f"rank {rank}: {line[:300]}"


def timed_row(
    case: MeshCase, plan: Plan, outcome: dict[str, Any], before: list[dict[str, Any]], environment: dict[str, Any]
) -> dict[str, Any]:
    """A row of results from what the ranks reported, with the efficiency against the rows `before`."""
    config = run_config(case, plan)
    sections = config.model, config.lora, config.data, config.train, config.parallel
    sent = communication(*sections, config.accumulation_steps, plan.device == "cuda" and plan.dtype != "fp32")
    tokens = case.rows * case.seq_len
    names = ["step_ms", "low_ms", "high_ms", "tokens_per_s", "per_gpu", "efficiency", "base_gpus", "mfu"]
    names += ["mfu_sheet", "peak_gib", "comm_ms", "comm_exposed_ms"]
    names += [f"{what}_{axis}" for what in ("ms", "sent") for axis in TRAFFIC_AXES]
    row: dict[str, Any] = {
        "preset": case.preset,
        "gpus": case.ranks,
        "mesh": case.mesh,
        **case.axes,
        "seq_len": case.seq_len,
        "rows": case.rows,
        "tokens": tokens,
        "scaling": scaling(case.axes),
        "activation_checkpointing": plan.activation_checkpointing,
        "status": "failed",
        "reason": "",
        **dict.fromkeys(names),
        "computed_bytes": sum(sent.values()),
        "compile_s": None,
        "left_gib": None,
        **outcome,
    }
    if row["status"] != "ok":
        return row
    row["tokens_per_s"] = tokens / (row["step_ms"] / 1e3)
    row["per_gpu"] = row["tokens_per_s"] / case.ranks
    for key, rate in (("mfu", "matmul_tflop_per_s"), ("mfu_sheet", "sheet_tflop_per_s")):
        if (peak := environment.get(rate)) is not None:
            row[key] = row["per_gpu"] * flops_per_token(config.model, case.seq_len) / (peak * 1e12)
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
    grows = {"rows": axes["replicate"] * axes["shard"] > 1, "length": axes["sequence"] > 1}
    weak = " and ".join(word for word in grows if grows[word])
    parts = [f"weak ({weak})"] if weak else []
    if axes["tensor"] > 1:
        parts.append("strong")
    return " x ".join(parts) or "-"
