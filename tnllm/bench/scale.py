"""The speed of training steps on several devices of this machine, on real ranks, by mesh.

    cases = scale_cases(["385m"], [1, 2, 4], ["fsdp", "sp"], seq_len=8192, tokens=16384)
    results = bench_scale(cases, "cuda", on_row=print)

Ranks are processes that torch.distributed.run starts (tnllm.bench.scale_rank); this one never touches a GPU. Each mesh is
first checked: ten updates of a small model against the same ten by one process. What is timed is the trainer's step.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tnllm.errors import RunError, UserError, did_you_mean
from tnllm.modeling.config import get_preset
from tnllm.modeling.flops import count_parameters, flops_per_token

MESHES = ("fsdp", "tp", "sp", "fsdp+tp", "fsdp+sp", "tp+sp")
_AXES = {"fsdp": "shard", "sp": "sequence", "tp": "tensor"}
_LONGEST_S = 240
_POLL_S = 0.2


@dataclass(frozen=True)
class ScaleCase:
    """One row: a step of `preset` on `gpus` ranks. Each rank that reads rows of its own reads `rows` of `seq_len` tokens.

    `parallel`: sizes of the axes; `reference`: rows and length of the one-rank step it is compared with. `limit` replaces
    the check's own (largest relative difference of a loss).
    """

    preset: str
    mesh: str
    gpus: int
    rows: int
    seq_len: int
    parallel: dict[str, int]
    reference: tuple[int, int]
    activation_checkpointing: str = "none"
    longest: bool = False
    limit: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a step on all ranks."""
        return self.rows * self.parallel["shard"] * self.seq_len


@dataclass(frozen=True)
class Settings:
    """What all cases share."""

    device: str
    dtype: str = "auto"
    compiled: bool = True
    steps: int = 8
    warmup: int = 3


def mesh_axes(name: str, gpus: int) -> dict[str, int] | None:
    """Sizes of the axes of a mesh on `gpus` ranks: "fsdp+tp" on 8 is shard 4 * tensor 2.

    None where a product has fewer than four ranks or an odd number. Raises UserError for an unknown name.
    """
    if name not in MESHES:
        raise UserError(f"--meshes has {name!r}; allowed: {', '.join(MESHES)}{did_you_mean(name, MESHES)}")
    sizes = {"shard": 1, "sequence": 1, "tensor": 1}
    first, _, second = name.partition("+")
    if second and (gpus < 4 or gpus % 2):
        return None
    sizes[_AXES[first]] = gpus // 2 if second else gpus
    if second:
        sizes[_AXES[second]] = 2
    return sizes


def scale_cases(
    presets: list[str], gpus: list[int], meshes: list[str], seq_len: int, tokens: int, checkpointing: str = "none"
) -> list[ScaleCase]:
    """All cases, those of one rank first: they are what the others are compared with, and always there.

    Without a sequence axis a data rank reads `tokens` / `seq_len` rows (at least one). With one it reads a single row, of
    `tokens` for each rank along it. Raises UserError for an unknown preset or mesh and a model that an axis cannot split.
    """
    short, long = (max(1, tokens // seq_len), seq_len), (1, tokens)
    alone = {"shard": 1, "sequence": 1, "tensor": 1}
    cases = []
    for preset in presets:
        model = get_preset(preset)
        many = []
        for count in sorted(set(gpus) - {1}):
            for name in dict.fromkeys(meshes):
                axes = mesh_axes(name, count)
                if axes is None:
                    continue
                for key in ("num_heads", "glu_dim", "vocab_size"):
                    if getattr(model, key) % axes["tensor"]:
                        raise UserError(
                            f"mesh {name} on {count} ranks has tensor {axes['tensor']}, which does not divide "
                            f"{preset}'s {key} {getattr(model, key)}; leave it out of --meshes or change --gpus"
                        )
                rows, length = (1, tokens * axes["sequence"]) if axes["sequence"] > 1 else short
                many.append(
                    ScaleCase(
                        preset, name, count, rows, length, axes, long if axes["sequence"] > 1 else short, checkpointing
                    )
                )
        needed = dict.fromkeys(case.reference for case in many) or [short]
        cases += [ScaleCase(preset, "one", 1, *shape, alone, shape, checkpointing) for shape in needed]
        cases += many
    return cases


@dataclass
class _Found:
    """What the ranks of one launch said, and what became of its cases."""

    environment: dict[str, Any] | None = None
    done: set[int] = field(default_factory=set)
    failed: list[dict[str, Any]] = field(default_factory=list)


def bench_scale(
    cases: list[ScaleCase],
    settings: Settings,
    longest: bool = False,
    note: Callable[[str], None] = lambda text: None,
    on_row: Callable[[dict[str, Any], dict[str, Any]], None] = lambda row, results: None,
    most: int | None = None,
) -> dict[str, Any]:
    """Check and time the cases. Returns {"environment", "accuracy": [...], "rows": [...]}, all plain values.

    `on_row` is given each row as it comes and the results so far. A row: the case; status "ok", "out of memory" or what
    a rank said last; parameters, tokens (of all ranks), step_ms (median, with low and high: the 20th and 80th
    percentile; of the slowest rank), tokens_per_s, tokens_per_s_per_gpu, efficiency (the latter over that of one rank
    on its reference), mfu, peak_gib (the fullest rank), collectives_ms (NCCL kernels of rank 0 in one step, overlapped
    or not, waiting included; null on CPU), and sent_bytes (a rank and step, by axis; computed). A mesh that fails its check
    has no row. `longest`: then rows of doubling length on one rank and on each "sp" mesh, until one does not run or has
    `most` tokens.
    """
    results: dict[str, Any] = {"environment": {}, "accuracy": [], "rows": []}
    groups: dict[tuple[str, int], list[ScaleCase]] = {}
    for case in cases:
        groups.setdefault((case.preset, case.gpus), []).append(case)
    for group in groups.values():
        left = list(group)
        while left:
            left = _try(left, settings, results, note, on_row)
    if longest:
        for group in groups.values():
            for case in group:
                if case.mesh == "sp" or (case.mesh == "one" and case.rows == 1):
                    _find_longest(case, settings, results, note, on_row, most)
    return results


def _try(
    cases: list[ScaleCase],
    settings: Settings,
    results: dict[str, Any],
    note: Callable[[str], None],
    on_row: Callable[[dict[str, Any], dict[str, Any]], None],
    timeout_s: float | None = None,
    check: bool = True,
) -> list[ScaleCase]:
    """Start the ranks once for `cases`, of one preset and number of ranks; returns those left when a rank failed."""
    first = cases[0]
    names = ", ".join(f"{case.mesh} {case.rows} x {case.seq_len}" for case in cases)
    note(f"starting {first.gpus} rank{'s' * (first.gpus > 1)} for {first.preset}: {names}")
    found = _Found()
    ended = None
    for line in _launch(cases, settings, timeout_s, check):
        if "environment" in line:
            results["environment"] = results["environment"] or _environment(line["environment"], settings)
        elif "accuracy" in line:
            _add_accuracy(cases[line["accuracy"]["id"]], line["accuracy"], found, results, note)
        elif "row" in line:
            found.done.add(line["row"]["id"])
            _add_row(cases[line["row"]["id"]], line["row"], results, on_row)
        elif "failed" in line:
            found.failed.append(line)
        else:
            ended = line["ended"]
    left = [index for index in range(len(cases)) if index not in found.done]
    if ended is None or not left:
        return []
    # The rank that ran out of memory says why the others lost it.
    errors = [line["error"] for line in found.failed] or [ended]
    status = "out of memory" if "out of memory" in errors else errors[0]
    _add_row(cases[left[0]], {"status": status}, results, on_row)
    return [cases[index] for index in left[1:]]


def _environment(said: dict[str, Any], settings: Settings) -> dict[str, Any]:
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bf16" if settings.device == "cuda" else "fp32"
    return {**said, "dtype": dtype, "compiled": settings.compiled, "steps": settings.steps, "warmup": settings.warmup}


def _add_accuracy(
    case: ScaleCase, said: dict[str, Any], found: _Found, results: dict[str, Any], note: Callable[[str], None]
) -> None:
    said = {"preset": case.preset, "mesh": case.mesh, "gpus": case.gpus, **said}
    number = said.pop("id")
    results["accuracy"].append(said)
    text = (
        f"{case.preset} {case.mesh} on {case.gpus} ranks: losses of {said['steps']} updates within {said['loss']:.1e} "
        f"of one process (limit {said['loss_limit']:g})"
    )
    if said["passed"]:
        note(f"check: {text}: ok")
    else:
        found.done.add(number)
        note(f"not timed: {text}: WRONG")


def _add_row(
    case: ScaleCase,
    said: dict[str, Any],
    results: dict[str, Any],
    on_row: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    model = get_preset(case.preset)
    plain = asdict(case)
    del plain["limit"]  # of the check, not of the row
    row: dict[str, Any] = {**plain, "tokens": case.tokens, "parameters": count_parameters(model)}
    empty = ("step_ms", "low_ms", "high_ms", "tokens_per_s", "tokens_per_s_per_gpu", "efficiency", "mfu", "peak_gib",
             "first_loss", "last_loss", "collectives_ms", "collectives_ms_by_group", "sent_bytes")  # fmt: skip
    row |= {"status": "", **dict.fromkeys(empty), **{key: value for key, value in said.items() if key != "id"}}
    if row["step_ms"] is not None:
        rate = case.tokens / (row["step_ms"] / 1e3)
        peak = results["environment"].get("matmul_tflop_per_s")
        row |= {"tokens_per_s": rate, "tokens_per_s_per_gpu": rate / case.gpus}
        alone = row if case.mesh == "one" else _reference(case, results["rows"])
        if alone is not None and not case.longest:
            row["efficiency"] = row["tokens_per_s_per_gpu"] / alone["tokens_per_s"]
        if peak is not None:
            row["mfu"] = rate * flops_per_token(model, case.seq_len) / (peak * 1e12 * case.gpus)
    results["rows"].append(row)
    on_row(row, results)


def _reference(case: ScaleCase, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of one rank on the same work a rank (weak scaling), or on the same step (tensor: strong scaling)."""
    for row in rows:
        same = row["preset"] == case.preset and row["mesh"] == "one" and not row["longest"]
        if same and (row["rows"], row["seq_len"]) == case.reference and row["status"] == "ok":
            return row
    return None


def _find_longest(
    case: ScaleCase,
    settings: Settings,
    results: dict[str, Any],
    note: Callable[[str], None],
    on_row: Callable[[dict[str, Any], dict[str, Any]], None],
    most: int | None,
) -> None:
    """Double the row until a launch fails. Each length has ranks of its own: one that ran out of memory is no use after."""
    quick = replace(settings, steps=2, warmup=0)
    before = [row for row in results["accuracy"] if (row["preset"], row["mesh"], row["gpus"]) == _key(case)]
    if any(not row["passed"] for row in before):
        return
    length = case.seq_len
    while most is None or length <= most:
        count = len(results["rows"])
        _try([replace(case, seq_len=length, longest=True)], quick, results, note, on_row, _LONGEST_S, check=not before)
        new = results["rows"][count:]
        if not new or new[0]["status"] != "ok":
            return
        before, length = before or new, 2 * length


def _key(case: ScaleCase) -> tuple[str, str, int]:
    return case.preset, case.mesh, case.gpus


def _launch(
    cases: list[ScaleCase], settings: Settings, timeout_s: float | None, check: bool
) -> Iterator[dict[str, Any]]:
    """The lines ranks write, as they come; at the end {"ended": why} where they did not end well."""
    gpus = cases[0].gpus
    with tempfile.TemporaryDirectory(prefix="tnllm-scale-") as name:
        folder = Path(name)
        out, said = folder / "results.jsonl", folder / "stderr.txt"
        out.touch()
        listed = [
            {**asdict(case), "id": index, "port": _free_port(), "check": check, "warmup": settings.warmup,
             "steps": settings.steps} for index, case in enumerate(cases)
        ]  # fmt: skip
        spec = {**asdict(settings), "out": str(out), "cases": listed}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        command += ["-m", "tnllm.bench.scale_rank", str(folder / "spec.json")]
        threads = str(max(1, (os.cpu_count() or 1) // gpus))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        with open(said, "wb") as errors, open(out, encoding="utf-8") as lines:
            ranks = subprocess.Popen(command, stdout=errors, stderr=errors, env=environment)
            started, partial, late = time.monotonic(), "", False
            try:
                while True:
                    over = ranks.poll() is not None
                    # After the end, once more: what was written since the last look.
                    partial += lines.read()
                    *whole, partial = partial.split("\n")
                    yield from (json.loads(line) for line in whole)
                    if over:
                        break
                    if timeout_s is not None and time.monotonic() - started > timeout_s:
                        late = True
                        _stop(ranks)
                    time.sleep(_POLL_S)
            finally:
                _stop(ranks)
        if ranks.returncode != 0:
            yield {"ended": f"longer than {timeout_s:g} s" if late and timeout_s else _last_line(said)}


def _stop(ranks: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its ranks."""
    if ranks.poll() is None:
        ranks.terminate()
        try:
            ranks.wait(60)
        except subprocess.TimeoutExpired:
            ranks.kill()
            ranks.wait()


def _last_line(file: Path) -> str:
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    # torchrun's own report is drawn with rules around it.
    told = [line for line in lines if line and set(line) - set("=-")]
    return told[-1][:200] if told else "the ranks ended without a word"


def _free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("localhost", 0))
        return chosen.getsockname()[1]


def check_passed(results: dict[str, Any]) -> None:
    """Raise RunError naming every mesh that was not timed because its check failed."""
    wrong = [f"{row['preset']} {row['mesh']} on {row['gpus']}" for row in results["accuracy"] if not row["passed"]]
    if wrong:
        raise RunError(f"not timed, since the losses are not those of one process: {', '.join(wrong)}")
