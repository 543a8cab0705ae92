"""Attention beside its peers: checked against float64 first, then time and memory by length.

    shapes = [Shape(batch=1, heads=16, length=length, head_dim=128) for length in (1024, 4096)]
    results = bench_attention(shapes, torch.bfloat16, ["tnllm", "fla"], torch.device("cuda"))

The floor is the time to move the operands once at the device's measured copy bandwidth: q, k, v, o forward; those and q,
k, v, do, dq, dk, dv for forward and backward.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from tnllm.bench.accuracy import relative_rms
from tnllm.bench.providers import PROVIDERS, Provider, outputs_and_gradients, softmax_reference
from tnllm.bench.timing import copy_bandwidth, extra_memory, measure
from tnllm.device import describe_device
from tnllm.errors import UserError, did_you_mean
from tnllm.kernels.lightning_attention.reference import quadratic

# Largest relative RMS error against float64 that is still timed. bf16 keeps 8 bits: rounding q, k, v, do and the result
# gives 2e-3 to 5e-3 in any implementation. fp32 peers may use tf32 products (3e-4).
ERROR_LIMIT = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 2e-3}
CHECK_LENGTH = 513  # odd, so that no block size divides it


@dataclass(frozen=True)
class Shape:
    """The inputs of every provider: q, k, v [batch, length, heads, head_dim]."""

    batch: int
    heads: int
    length: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Elements of one operand."""
        return self.batch * self.heads * self.length * self.head_dim


def slopes(heads: int, device: torch.device) -> Tensor:
    """log-decays of the first layer of a released model: 2^(-8(h+1)/H)."""
    return -torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)


def choose(names: list[str], device: torch.device, dtype: torch.dtype, log: Callable[[str], None]) -> list[Provider]:
    """The providers of these names that can run here; logs why the others cannot."""
    for name in names:
        if name not in PROVIDERS:
            raise UserError(
                f"provider {name!r} is unknown; allowed: {', '.join(PROVIDERS)}{did_you_mean(name, PROVIDERS)}"
            )
    chosen = []
    for provider in (PROVIDERS[name] for name in names):
        reason = provider.missing(device, dtype)
        if reason is None:
            chosen.append(provider)
        else:
            log(f"skipped {provider.name}: {reason}")
    return chosen


def bench_attention(
    shapes: list[Shape],
    dtype: torch.dtype,
    names: list[str],
    device: torch.device,
    budget_s: float = 0.5,
    log: Callable[[str], None] = lambda text: None,
    on_row: Callable[[dict], None] = lambda results: None,
) -> dict:
    """Check and time one provider after another: {"environment", "accuracy": [...], "rows": [...]}, plain values.

    `on_row` gets the results so far after each row, so that an interrupted run loses none.

    A row: provider and shape; fwd_ms and fwd_bwd_ms (median, with low and high), over_floor and host_ms for each;
    compile_ms; tb_per_s, tflop_per_s; extra_mib (fwd+bwd, inputs not counted; null on CPU).
    """
    providers = choose(names, device, dtype, log)
    bandwidth = copy_bandwidth(device)
    environment = {
        **describe_device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "copy_tb_per_s": bandwidth / 1e12,
    }
    accuracy: list[dict] = []
    rows: list[dict] = []
    results = {"environment": environment, "accuracy": accuracy, "rows": rows}
    order = {tuple(asdict(shape).values()): index for index, shape in enumerate(shapes)}
    limit = ERROR_LIMIT[dtype]
    # One provider after another: one that compiles for many minutes delays only those after it.
    for provider in providers:
        log(f"checking {provider.name} against float64")
        errors = check(provider, shapes[0], dtype, device)
        good = all(error <= limit for error in errors.values())
        accuracy.append({"provider": provider.name, **errors, "limit": limit, "passed": good})
        if not good:
            log(f"not timed: {provider.name} is wrong (relative error {max(errors.values()):.2g}, limit {limit:g})")
            continue
        for shape in shapes:
            row = _time(provider, shape, dtype, device, bandwidth, budget_s, log)
            if row is not None:
                log(f"  forward {row['fwd_ms']:.3f} ms, with backward {row['fwd_bwd_ms']:.3f} ms")
                rows.append(row)
                # Providers of one shape stand together in the table.
                rows.sort(key=lambda row: order[row["batch"], row["heads"], row["length"], row["head_dim"]])
                on_row(results)
    return results


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device, heads_first: bool) -> list[Tensor]:
    """q, k, v and the gradient of o; random, never zeros."""
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    inputs = [torch.randn(size, device=device, dtype=dtype) for _ in range(4)]
    # Scores as large as SiLU and normalised activations give, so that outputs stay in fp16's range.
    inputs[0] *= shape.head_dim**-0.5
    return [x.transpose(1, 2).contiguous() for x in inputs] if heads_first else inputs


def check(provider: Provider, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative RMS error of o, dq, dk, dv against float64, on fresh random inputs of an odd length."""
    log_decay = slopes(shape.heads, device)
    inputs = _inputs(replace(shape, batch=2, length=CHECK_LENGTH), dtype, device, heads_first=False)
    q, k, v = exact = [x.double().requires_grad_() for x in inputs[:3]]
    expected = softmax_reference(q, k, v) if provider.softmax else quadratic(q, k, v, log_decay)[0]
    exact_grads = torch.autograd.grad(expected, exact, inputs[3].double())
    results = outputs_and_gradients(provider, inputs, log_decay)
    pairs = zip(results.items(), (expected.detach(), *exact_grads), strict=True)
    return {name: relative_rms(result, exact) for (name, result), exact in pairs}


def _time(
    provider: Provider,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float,
    budget_s: float,
    log: Callable[[str], None],
) -> dict | None:
    elements, itemsize = shape.elements, dtype.itemsize
    if provider.quadratic_memory:
        # Scores, masked scores and their gradients, besides the mask itself.
        needed = (4 * shape.batch + 1) * shape.heads * shape.length**2 * itemsize
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 << 30
        if needed > 0.8 * free:
            log(f"skipped {provider.name} at {shape.length}: its [T, T] scores need {needed / 2**30:.0f} GiB")
            return None
    log_decay = slopes(shape.heads, device)
    *parts, grad = _inputs(shape, dtype, device, provider.heads_first)
    q, k, v = leaves = [part.requires_grad_() for part in parts]

    def forward() -> Tensor:
        with torch.no_grad():
            return provider.attend(q, k, v, log_decay)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(provider.attend(q, k, v, log_decay), leaves, grad)

    log(f"timing {provider.name} at {shape.batch} x {shape.length}")
    try:
        fwd = measure(forward, device, budget_s)
        fwd_bwd = measure(both, device, budget_s)
        memory = extra_memory(both, device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        log(f"skipped {provider.name} at {shape.length}: out of memory")
        return None
    floors = (4 * elements * itemsize / bandwidth * 1e3, 11 * elements * itemsize / bandwidth * 1e3)
    # Multiply-adds by the definition of the function: the recurrence for linear attention, the causal half for softmax.
    flops = elements * (2.0 * (shape.length + 1) if provider.softmax else 4.0 * shape.head_dim)
    return {
        "provider": provider.name,
        **asdict(shape),
        "fwd_ms": fwd.median_ms,
        "fwd_low_ms": fwd.low_ms,
        "fwd_high_ms": fwd.high_ms,
        "fwd_over_floor": fwd.median_ms / floors[0],
        "fwd_tb_per_s": 4 * elements * itemsize / fwd.median_ms / 1e9,
        "fwd_tflop_per_s": flops / fwd.median_ms / 1e9,
        "fwd_bwd_ms": fwd_bwd.median_ms,
        "fwd_bwd_low_ms": fwd_bwd.low_ms,
        "fwd_bwd_high_ms": fwd_bwd.high_ms,
        "fwd_bwd_over_floor": fwd_bwd.median_ms / floors[1],
        "fwd_bwd_ns_per_token": 1e6 * fwd_bwd.median_ms / (shape.batch * shape.length),
        "fwd_host_ms": fwd.host_ms,
        "fwd_bwd_host_ms": fwd_bwd.host_ms,
        "compile_ms": fwd.compile_ms + fwd_bwd.compile_ms,
        "extra_mib": None if memory is None else memory / 2**20,
        "floor_fwd_ms": floors[0],
        "floor_fwd_bwd_ms": floors[1],
    }
