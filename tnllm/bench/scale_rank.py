"""One of the ranks that `tnllm bench-scale` times: `torchrun … -m tnllm.bench.scale_rank SPEC.json`.

The spec says which meshes to try, one after another, and where rank 0 appends one JSON line for each thing found. A rank
that fails appends its error and leaves; the others are then stopped by torchrun.
"""

import json
import math
import os
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tnllm.bench.timing import describe_device
from tnllm.bench.train import Case, Step, forget, run_config, step_times, wait
from tnllm.modeling.config import ModelConfig
from tnllm.parallel.mesh import Mesh, close_mesh, open_mesh
from tnllm.training.communication import communication
from tnllm.training.config import ParallelSection, RunConfig
from tnllm.training.loop import compute_dtype
from tnllm.training.metrics import matmul_rate

# Largest relative difference of a loss from the one-process trainer's that is still timed. In fp32 only the order of sums
# differs. In bf16 (8 bits) products are split between ranks and rounded in another order, and ten updates pass it on.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-3}
_GATE_STEPS, _GATE_LAYERS, _GATE_VOCAB, _GATE_LENGTH, _GATE_ROWS = 10, 2, 2048, 256, 4
_TIMEOUT_S = 300


def main(spec_file: Path) -> None:
    """Run every case of the spec as the rank that torchrun's environment names."""
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    out, rank = Path(spec["out"]), int(os.environ["RANK"])
    device = torch.device(spec["device"])
    case: dict[str, Any] | None = None
    try:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        environment = _environment(spec, device)
        if rank == 0:
            _append(out, {"environment": environment})
        for case in spec["cases"]:
            _run(spec, case, device, out, rank)
    except Exception as error:
        _append(out, {"failed": None if case is None else case["id"], "rank": rank, "error": _in_short(error)})
        # No clean-up: it would wait for ranks that wait for this one.
        sys.stderr.flush()
        os._exit(1)


def _environment(spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    rate = matmul_rate(device)
    found = {**describe_device(device), "matmul_tflop_per_s": None if rate is None else rate / 1e12}
    if device.type == "cuda":
        found["gpu_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return found


def _run(spec: dict[str, Any], case: dict[str, Any], device: torch.device, out: Path, rank: int) -> None:
    parallel = ParallelSection(**case["parallel"], timeout_s=_TIMEOUT_S)
    ranks = math.prod(case["parallel"].values())
    mesh = _open(case["port"], parallel, device) if ranks > 1 else None
    forget(device)
    if mesh is not None and case["check"]:
        found = gate(spec, case, parallel, device, mesh)
        if rank == 0:
            _append(out, {"accuracy": {"id": case["id"], **found}})
        if not found["passed"]:
            close_mesh(mesh)
            return
        forget(device)
    row = measure(spec, case, parallel, device, mesh)
    if rank == 0:
        _append(out, {"row": {"id": case["id"], **row}})
    forget(device)
    if mesh is not None:
        close_mesh(mesh)


def _open(port: int, parallel: ParallelSection, device: torch.device) -> Mesh:
    # A store of its own: torchrun's still holds the addresses of the mesh before.
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    axes = parallel
    return open_mesh(axes.replicate, axes.shard, axes.sequence, axes.tensor, device.type, axes.timeout_s)


def _append(out: Path, line: dict[str, Any]) -> None:
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _in_short(error: Exception) -> str:
    # The compiler wraps the error of the allocator in one of its own.
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def gate(
    spec: dict[str, Any], case: dict[str, Any], parallel: ParallelSection, device: torch.device, mesh: Mesh
) -> dict[str, Any]:
    """Ten updates of a small model on the mesh, against the same ten by one process: the losses' largest difference.

    The same weights and the same global batches; precision, compilation and recomputation are those of the timed step.
    """
    rows = max(1, _GATE_ROWS // mesh.data_size)
    part = Case(case["preset"], "transnormer", _GATE_LENGTH, rows, case["activation_checkpointing"])
    whole = replace(part, rows=rows * mesh.data_size)
    exact = _one_process(whole, device, spec["compiled"], spec["dtype"])
    config = run_config(part, device, spec["compiled"], spec["dtype"], _small(part), parallel)
    ours = _losses(config, device, mesh)
    differences = [abs(got - wanted) / wanted for got, wanted in zip(ours, exact, strict=True)]
    limit = LIMITS[compute_dtype(config, device)]
    limit = limit if case["limit"] is None else case["limit"]
    worst = max(differences, key=lambda value: math.inf if math.isnan(value) else value)
    return {
        "loss": worst,
        "loss_limit": limit,
        "steps": _GATE_STEPS,
        "first_loss": exact[0],
        "last_loss": exact[-1],
        # Written so that NaN fails.
        "passed": worst <= limit,
    }


@cache
def _one_process(case: Case, device: torch.device, compiled: bool, dtype: str) -> list[float]:
    """The losses meshes are held against; the same for all that split the same batch."""
    return _losses(run_config(case, device, compiled, dtype, _small(case)), device, None)


def _small(case: Case) -> ModelConfig:
    full = case.model
    changes = {"num_layers": min(full.num_layers, _GATE_LAYERS), "vocab_size": min(full.vocab_size, _GATE_VOCAB)}
    return full.model_copy(update={**changes, "pad_token_id": 0})


def _losses(config: RunConfig, device: torch.device, mesh: Mesh | None) -> list[float]:
    forget(device)
    step = Step(config, device, mesh)
    for _ in range(_GATE_STEPS):
        step()
    return step.losses


def measure(
    spec: dict[str, Any], case: dict[str, Any], parallel: ParallelSection, device: torch.device, mesh: Mesh | None
) -> dict[str, Any]:
    """Time the case's steps. Times of a step and peak memory are those of the slowest and fullest rank."""
    timed = Case(case["preset"], "transnormer", case["seq_len"], case["rows"], case["activation_checkpointing"])
    config = run_config(timed, device, spec["compiled"], spec["dtype"], parallel=parallel)
    step = Step(config, device, mesh)
    ranks = step.trainer.ranks
    for _ in range(1 + case["warmup"]):
        step()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [max(ranks.spread(value)) for value in step_times(step, device, case["steps"])]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    peak = max(ranks.spread(peak))
    losses = step.losses
    collectives = _collectives(step, device) if mesh is not None and device.type == "cuda" else None
    times.sort()
    count = len(times)
    median, low, high = (times[min(count - 1, int(count * share))] for share in (0.5, 0.2, 0.8))
    return {
        "status": "ok" if all(map(math.isfinite, losses)) else "loss not finite",
        "step_ms": median,
        "low_ms": low,
        "high_ms": high,
        "peak_gib": peak or None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "collectives_ms": None if collectives is None else sum(collectives.values()),
        "collectives_ms_by_group": collectives,
        "sent_bytes": _sent(config, device),
    }


def _sent(config: RunConfig, device: torch.device) -> dict[str, float]:
    """Bytes one rank sends in a step, by axis; computed."""
    return communication(config, compute_dtype(config, device) == torch.bfloat16)


def _collectives(step: Step, device: torch.device) -> dict[str, float]:
    """Milliseconds that this rank's NCCL kernels ran in one more step, by process group; waits for slower ranks count.

    Groups are those of the mesh, "mesh_weights" is FSDP's; "all" where the profiler does not tell them apart.
    """
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return by_group(events)


def by_group(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of NCCL kernels in a Chrome trace, by the description of their process group."""
    found: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "kernel" and "nccl" in event.get("name", "").lower():
            name = event.get("args", {}).get("Process Group Description") or "all"
            found[name] = found.get(name, 0.0) + event["dur"] / 1e3
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
