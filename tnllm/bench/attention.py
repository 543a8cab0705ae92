"""Attention beside its peers: checked against float64 first, then time and memory by length.

    shapes = [Shape(batch=1, heads=16, length=length, head_dim=128) for length in (1024, 4096)]
    results = bench_attention(shapes, torch.bfloat16, ["tnllm", "fla"], torch.device("cuda"))

The floor is the time to move the operands once at the device's measured copy bandwidth: q, k, v, o forward; those and q,
k, v, do, dq, dk, dv for forward and backward.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from tnllm.bench.accuracy import relative_rms
from tnllm.bench.budget import Budget
from tnllm.bench.providers import PROVIDERS, Provider, outputs_and_gradients
from tnllm.bench.timing import Timing, calls, copy_bandwidth, extra_memory, measure, synchronize
from tnllm.device import data_sheet, describe_device
from tnllm.errors import UserError, did_you_mean

# Largest relative RMS error against float64 that is still timed. bf16 keeps 8 bits: rounding q, k, v, do and the result
# gives 2e-3 to 5e-3 in any implementation. fp32 peers may use tf32 products (3e-4).
ERROR_LIMIT = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 2e-3}
CHECK_LENGTH = 513  # odd, so that no block size divides it
# A length is forecast from one that is at most so many times shorter; the shortest that is timed for that alone.
_RUNG, _SHORTEST = 4, 512


@dataclass(frozen=True)
class Shape:
    """The inputs of every provider: q, k, v [batch, length, heads, head_dim]."""

    batch: int
    heads: int
    length: int
    head_dim: int

    @property
    def elements(self) -> int:
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
    budget: Budget | None = None,
) -> dict:
    """Check and time one provider after another: {"environment", "accuracy": [...], "rows": [...]}, plain values.

    `on_row` gets the results so far after each row, so that an interrupted run loses none. `budget_s`: seconds for each
    measurement; `budget`: minutes for all of them. What does not fit the minutes is extrapolated from a shorter length.

    A row: provider and shape; fwd_ms and fwd_bwd_ms (median, with low and high), over_floor and host_ms for each,
    sheet_share (the floor's bytes over the time, as a share of the data sheet's bandwidth; null where unknown),
    repeats; compile_ms; tb_per_s, tflop_per_s; extra_mib (fwd+bwd, inputs not counted; null on CPU); extrapolated_from:
    the length whose time was scaled by the work (null: timed), with null for what only a timing gives.
    """
    budget = budget or Budget(log=log)
    providers = choose(names, device, dtype, log)
    bandwidth = copy_bandwidth(device)
    environment = {**describe_device(device), "dtype": str(dtype).removeprefix("torch.")}
    environment["copy_tb_per_s"] = bandwidth / 1e12
    results: dict = {"environment": environment, "accuracy": [], "rows": []}
    limit = ERROR_LIMIT[dtype]
    later: list[tuple[_Clock, Shape, int]] = []

    def identity(row: dict) -> tuple[int, int]:
        return shapes.index(Shape(*(row[key] for key in asdict(shapes[0])))), names.index(row["provider"])

    def keep(row: dict) -> None:
        log(_line(row))
        others = [other for other in results["rows"] if identity(other) != identity(row)]
        # Providers of one shape stand together in the table.
        results["rows"] = sorted([*others, row], key=identity)
        on_row(results)

    with budget:
        # One provider after another: one that compiles for many minutes delays only those after it.
        for number, provider in enumerate(providers):
            log(f"checking {provider.name} against float64{f' ({provider.differs})' if provider.differs else ''}")
            try:
                errors = check(provider, shapes[0], dtype, device)
            # A peer may fail in any way, and must not take the others with it; our own fault is shown.
            except Exception as error:
                if provider.module is None:
                    raise
                log(f"skipped {provider.name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
                continue
            good = all(error <= limit for error in errors.values())
            missing = dict.fromkeys(("o", "dq", "dk", "dv"))
            results["accuracy"].append(
                {"provider": provider.name, **missing, **errors, "limit": limit, "passed": good,
                 "differs": provider.differs}
            )  # fmt: skip
            if not good:
                log(f"not timed: {provider.name} is wrong (relative error {max(errors.values()):.2g}, limit {limit:g})")
                continue
            budget.part(len(providers) - number)
            clock = _Clock(provider, dtype, device, budget_s, budget)
            for shape in shapes:
                if (row := clock.row(shape, bandwidth)) is not None:
                    keep(row)
                    if row["extrapolated_from"] is not None:
                        later.append((clock, shape, row["extrapolated_from"]))
        # With the time that the others left, shortest first.
        later.sort(key=lambda item: item[0].seconds(item[1]))
        for clock, shape, near in later:
            budget.part(1)
            if (row := clock.row(shape, bandwidth)) is not None and row["extrapolated_from"] != near:
                keep(row)
    return results


def _line(row: dict) -> str:
    how = "" if row["extrapolated_from"] is None else f", extrapolated from {row['extrapolated_from']} tokens"
    both = "no gradients" if row["fwd_bwd_ms"] is None else f"with backward {row['fwd_bwd_ms']:.3f} ms"
    return (
        f"{row['provider']}, {row['batch']} x {row['heads']} x {row['length']} x {row['head_dim']}: "
        f"forward {row['fwd_ms']:.3f} ms, {both}{how}"
    )


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
    length = max(CHECK_LENGTH // provider.multiple, 1) * provider.multiple
    inputs = _inputs(replace(shape, batch=2, length=length), dtype, device, heads_first=False)
    q, k, v = exact = [x.double().requires_grad_() for x in inputs[:3]]
    expected = provider.definition(q, k, v, log_decay)
    exact_grads = torch.autograd.grad(expected, exact, inputs[3].double())
    results = outputs_and_gradients(provider, inputs, log_decay)
    # Without gradients the zip ends with o.
    pairs = zip(results.items(), (expected.detach(), *exact_grads), strict=False)
    return {name: relative_rms(result, exact) for (name, result), exact in pairs}


class _Clock:
    """Times one provider, within what the budget leaves it."""

    def __init__(
        self, provider: Provider, dtype: torch.dtype, device: torch.device, budget_s: float, budget: Budget
    ) -> None:
        self.provider, self.dtype, self.device = provider, dtype, device
        self.budget_s, self.budget = budget_s, budget
        # By the work that was timed.
        self._lengths: dict[float, int] = {}

    def row(self, shape: Shape, bandwidth: float) -> dict | None:
        """A row of results; None where it does not run, with the reason in the log."""
        name = f"{self.provider.name} at {shape.batch} x {shape.length}"
        if shape.length % self.provider.multiple:
            self.budget.log(f"skipped {name}: takes multiples of {self.provider.multiple} tokens")
            return None
        if (needed := self._scores_bytes(shape)) > 0.8 * self._free_bytes():
            self.budget.log(f"skipped {name}: its [T, T] scores need {needed / 2**30:.0f} GiB")
            return None
        try:
            self._climb(shape)
            forecast = self._forecast(shape)
            usual = None if forecast is None else sum(calls(s, self.budget_s) * s for s in forecast)
            if self.budget.allows(name, usual, None if forecast is None else 2 * sum(forecast)):
                fwd, both, memory = self._time(shape)
                return self._row(shape, bandwidth, fwd, both, memory)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.budget.log(f"skipped {name}: out of memory")
            return None
        near = self.budget.nearest(self._key(0), self._flops(shape))
        if forecast is None or near is None:
            return None
        fwd, both = (Timing(1e3 * seconds, 0.0, 0.0, 0.0, 0.0, 0) for seconds in forecast)
        return self._row(shape, bandwidth, fwd, both, None, self._lengths[near])

    def _key(self, backward: int) -> tuple[str, int]:
        return self.provider.name, backward

    def _flops(self, shape: Shape) -> float:
        """Multiply-adds of the forward pass, as this provider computes it: the time grows with them."""
        if self.provider.softmax or self.provider.quadratic_memory:
            return shape.elements * 2.0 * (shape.length + 1)
        return shape.elements * 4.0 * shape.head_dim

    def _forecast(self, shape: Shape) -> tuple[float, float] | None:
        """Seconds of a forward call, and of one with backward."""
        forward, both = (self.budget.forecast(self._key(backward), self._flops(shape)) for backward in (0, 1))
        return None if forward is None or both is None else (forward, both)

    def seconds(self, shape: Shape) -> float:
        """Forecast of a call of each kind together; 0 where nothing is known."""
        return sum(self._forecast(shape) or ())

    def _climb(self, shape: Shape) -> None:
        """Time single calls of shorter lengths, each forecast from the one before, until `shape` can be forecast."""
        lengths = [shape.length // _RUNG]
        while lengths[-1] >= _RUNG * _SHORTEST:
            lengths.append(lengths[-1] // _RUNG)
        known = max((length for length in self._lengths.values() if length <= shape.length), default=0)
        for length in (length for length in reversed(lengths) if length > known and length >= _SHORTEST):
            rung = replace(shape, length=length)
            # What it takes must leave time for the next one.
            if self.seconds(rung) > 0.4 * self.budget.left_s:
                return
            if self._scores_bytes(rung) <= 0.8 * self._free_bytes():
                self._learn(rung, *(self._once(run) for run in self._runs(rung)))

    def _learn(self, shape: Shape, forward: float, both: float) -> None:
        for backward, seconds in enumerate((forward, both)):
            self.budget.learn(self._key(backward), self._flops(shape), seconds)
        self._lengths[self._flops(shape)] = shape.length

    def _once(self, run: Callable[[], object]) -> float:
        """Seconds of a call; of a short one the better of two, since the first compiles."""
        times: list[float] = []
        while not times or (len(times) < 2 and (times[0] < 1 or not self._lengths)):
            started = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - started)
        return min(times)

    def _runs(self, shape: Shape) -> tuple[Callable[[], object], Callable[[], object]]:
        """The two calls that are timed."""
        log_decay, attend = slopes(shape.heads, self.device), self.provider.attend
        *parts, grad = _inputs(shape, self.dtype, self.device, self.provider.heads_first)
        q, k, v = leaves = [part.requires_grad_() for part in parts]

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(q, k, v, log_decay)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(q, k, v, log_decay), leaves, grad)

        return forward, both if self.provider.backward else forward

    def _time(self, shape: Shape) -> tuple[Timing, Timing, int | None]:
        forward, both = self._runs(shape)
        # A backward pass costs at least twice a forward one.
        fwd = measure(forward, self.device, self.budget_s, self.budget.left_s / 4)
        fwd_bwd = measure(both, self.device, self.budget_s, self.budget.left_s)
        self._learn(shape, fwd.median_ms / 1e3, fwd_bwd.median_ms / 1e3)
        return fwd, fwd_bwd, extra_memory(both, self.device)

    def _scores_bytes(self, shape: Shape) -> int:
        """Scores, masked scores and their gradients, besides the mask itself, where a provider keeps them."""
        count = (4 * shape.batch + 1) * shape.heads * shape.length**2 * self.dtype.itemsize
        return count if self.provider.quadratic_memory else 0

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 4 << 30

    def _row(
        self,
        shape: Shape,
        bandwidth: float,
        fwd: Timing,
        both: Timing,
        memory: int | None,
        extrapolated_from: int | None = None,
    ) -> dict:
        card = data_sheet(self.device)
        # By the definition of the function: the recurrence for linear attention, the causal half for softmax.
        flops = shape.elements * (2.0 * (shape.length + 1) if self.provider.softmax else 4.0 * shape.head_dim)
        row: dict = {"provider": self.provider.name, **asdict(shape), "extrapolated_from": extrapolated_from}
        for name, operands, timing in (("fwd", 4, fwd), ("fwd_bwd", 11, both)):
            nbytes = operands * shape.elements * self.dtype.itemsize
            row |= {
                f"{name}_ms": timing.median_ms,
                f"{name}_low_ms": timing.low_ms,
                f"{name}_high_ms": timing.high_ms,
                f"floor_{name}_ms": 1e3 * nbytes / bandwidth,
                f"{name}_over_floor": timing.median_ms / (1e3 * nbytes / bandwidth),
                f"{name}_sheet_share": None if card is None else 1e3 * nbytes / card.bandwidth / timing.median_ms,
                f"{name}_repeats": timing.repeats,
                f"{name}_host_ms": timing.host_ms,
            }
        row |= {
            "fwd_tb_per_s": 4 * shape.elements * self.dtype.itemsize / fwd.median_ms / 1e9,
            "fwd_tflop_per_s": flops / fwd.median_ms / 1e9,
            "fwd_bwd_ns_per_token": 1e6 * both.median_ms / (shape.batch * shape.length),
            "compile_ms": fwd.compile_ms + both.compile_ms,
            "extra_mib": None if memory is None else memory / 2**20,
        }
        if extrapolated_from is not None:
            row |= dict.fromkeys(key for key in row if key.endswith(("_low_ms", "_high_ms", "_host_ms", "compile_ms")))
        if not self.provider.backward:
            row |= dict.fromkeys([key for key in row if key.startswith("fwd_bwd")] + ["extra_mib"])
        return row
