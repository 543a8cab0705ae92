"""Where a training step of a small model goes: what each group of kernels must take, and on a GPU what it takes.

python -m tests.bench.small_model                  # recipes/evidence/42m.yaml: 46M parameters, 32 rows of 2,048
python -m tests.bench.small_model --json small.json

A group must take the larger of its products at the matrix rate and its bytes at the copy rate: measured on a GPU, elsewhere
those of an H100. Bytes are those of each kernel's own tensors, in bf16, read or written once.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tnllm.bench.report import environment_line, print_table, write_json
from tnllm.bench.timing import copy_bandwidth, synchronize
from tnllm.bench.train import Case, Step, run_config, timed_step
from tnllm.device import describe_device
from tnllm.modeling.config import ModelConfig, get_preset
from tnllm.modeling.flops import count_parameters, flops_per_token
from tnllm.training.metrics import matmul_rate

MODEL = get_preset("tiny", num_layers=12, model_dim=512, num_heads=4, glu_dim=1408)
# Matrix products and copies of an H100, where none is present.
H100 = (723e12, 3.02e12)
# Group → what the names of its kernels hold; the first that fits counts.
KERNELS = {
    "attention": ("attend_kernel", "sub_split_states", "scan_states", "bounds_kernel", "add_initial"),
    "gate": ("_silu_", "_norm_gate", "silu_kernel"),
    "GLU": ("_glu_",),
    "loss": ("_softmax_kernel",),
    "optimizer": ("multi_tensor", "adam", "foreach"),
    "products": ("gemm", "cutlass", "nvjet", "xmma"),
}


def predict(config: ModelConfig, tokens: int, seq_len: int) -> dict[str, tuple[float, float, int]]:
    """Group → FLOPs, bytes and launches of a step on one GPU without recomputation."""
    N, M, F, V, L = tokens, config.model_dim, config.glu_dim, config.vocab_size, config.num_layers
    D = config.head_dim
    attention = 12.0 * L * M * D * N
    products = flops_per_token(config, seq_len) * N - attention
    weights = count_parameters(config)
    # Elements of operands and results of the three products of a layer, in the forward pass; backward twice as many.
    layer = (M + 4 * M) + (M + M) + (M + 2 * F) + (F + M)
    return {
        "products": (products, 2.0 * N * 3 * (L * layer + M + V) + 3 * 2 * weights, 3 * (4 * L + 1)),
        # Forward q, k, v, o; backward with v, k and do read twice.
        "attention": (attention, 2.0 * N * L * 14 * M + 2.0 * N * L * 4 * M, 3 * L),
        # SiLU: q, k in and out, in the backward pass also their gradients. Norm and gate: o, u, y; o, u, dy, do, du.
        "gate": (0.0, 2.0 * N * L * M * ((4 + 6) + (3 + 5)), 4 * L),
        "GLU": (0.0, 2.0 * N * L * F * (3 + 5), 2 * L),
        # Two norms and two sums of the residual stream a layer: x, y, sum; in the backward pass x, dy, dx, sum.
        "norms and sums": (0.0, 2.0 * N * (2 * L + 1) * M * (3 + 4), 4 * L),
        # Logits written by the product, read, their gradient written, read by two products.
        "loss": (0.0, 2.0 * N * V * 2, 2),
        # fp32 weights, gradients and two moments, three of them written, and a copy in bf16.
        "optimizer": (0.0, weights * (4 * 7 + 2.0), 8),
    }


def measured(step: Step, device: torch.device, steps: int) -> dict[str, tuple[float, float]]:
    """Group → milliseconds and launches of a step by torch.profiler; "other": kernels that fit no group."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return group(((event.name, event.time_range.elapsed_us()) for event in kernels), steps)


def group(kernels: Iterable[tuple[str, float]], steps: int) -> dict[str, tuple[float, float]]:
    """Names and microseconds of kernels, summed by group, per step."""
    sums: dict[str, tuple[float, float]] = {}
    for name, us in kernels:
        fits = (key for key, parts in KERNELS.items() if any(part in name for part in parts))
        # Norms, sums and casts that the compiler made have names of their own: triton_red_fused_…, and _fwd_, _bwd_kernel.
        inductor = "norms and sums" if name.startswith(("triton_", "_fwd_kernel", "_bwd_kernel")) else "other"
        key = next(fits, inductor)
        ms, count = sums.get(key, (0.0, 0.0))
        sums[key] = ms + us / 1e3 / steps, count + 1 / steps
    return sums


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Where a small model's training step goes.")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    matrix, copy = (matmul_rate(device) or H100[0], copy_bandwidth(device)) if on_gpu else H100
    case = Case("tiny", "transnormer", options.seq_len, options.rows)
    predicted = predict(MODEL, case.rows * case.seq_len, case.seq_len)
    took: dict[str, tuple[float, float]] = {}
    results: dict = {"environment": describe_device(device), "rates": {"matrix": matrix, "copy": copy}}
    if on_gpu:
        step, results["step"] = timed_step(run_config(case, device, True, model=MODEL), device, options.steps, 5)
        took = measured(step, device, options.steps)
    rows = []
    for key in dict.fromkeys([*predicted, *took]):
        flops, size, launches = predicted.get(key, (0.0, 0.0, 0))
        ms, count = took.get(key, (None, None))
        floor = 1e3 * max(flops / matrix, size / copy)
        rows.append(
            {"group": key, "tflop": flops / 1e12, "gb": size / 1e9, "must_ms": floor, "launches": launches}
            | {"ms": ms, "count": count, "x": ms / floor if ms is not None and floor else None}
        )
    results["rows"] = rows
    print(environment_line(results["environment"]))
    columns = [("group", "{group}"), ("TFLOP", "{tflop:.2f}"), ("GB", "{gb:.2f}"), ("must take ms", "{must_ms:.2f}")]
    columns += [("launches", "{launches}"), ("took ms", "{ms:.2f}"), ("launches", "{count:.0f}"), ("x", "{x:.2f}")]
    print_table("a step's time by group", columns, rows)
    total = sum(row["must_ms"] for row in rows)
    print(f"all: must take {total:.1f} ms, {case.rows * case.seq_len / total / 1e3:.2f}M tokens/s")
    if on_gpu:
        busy, whole = sum(ms for ms, _ in took.values()), results["step"]["step_ms"]
        print(f"kernels {busy:.1f} ms of a step of {whole:.1f} ms; the rest is gaps between them")
    if options.json:
        write_json(results, options.json)


if __name__ == "__main__":
    main()
