"""Timing: compile and warm up first, then medians with their spread; measured bandwidth and peak memory.

timing = measure(lambda: f(x), device)     # Timing(median_ms, low_ms, high_ms, compile_ms, host_ms)
bandwidth = copy_bandwidth(device)         # bytes/s, reads and writes counted
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Read before every repetition on a GPU, so that no input is still in the L2 cache. Writing instead would leave dirty
# lines that are written back while the timed call runs: 40 MB or more, as much as a small call moves itself.
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile; compilation (first call minus median); host time of one call.

    On a GPU the first three are device time, with the host running ahead as it does in training; where `host_ms` is
    larger, a single call is limited by the host. `repeats`: calls behind the median.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    compile_ms: float
    host_ms: float
    repeats: int


def calls(seconds: float, budget_s: float, fewest: int = 5) -> int:
    """How often `measure` calls something that takes `seconds`: twice beforehand, then until `budget_s` is spent."""
    return 2 + int(min(200, max(fewest, budget_s / max(seconds, 1e-6))))


def measure(
    run: Callable[[], Any], device: torch.device, budget_s: float = 0.5, limit_s: float = float("inf")
) -> Timing:
    """Time `run` until `budget_s` is spent: 5 to 200 repetitions, or down to one so as to end within `limit_s`."""
    begun = started = time.perf_counter()
    run()
    synchronize(device)
    first = time.perf_counter() - started
    started = time.perf_counter()
    run()
    host = time.perf_counter() - started
    synchronize(device)
    again = time.perf_counter() - started
    # On a CPU the second call is as good as any later one.
    known = [] if device.type == "cuda" else [1e3 * again]
    left_s = limit_s - (time.perf_counter() - begun)
    repeats = int(min(calls(again, budget_s) - 2, max(1 - len(known), left_s / max(again, 1e-6))))
    times = known + (_gpu_times(run, device, repeats, host) if device.type == "cuda" else cpu_times(run, repeats))
    median, low, high = spread(times)
    return Timing(median, low, high, max(0.0, 1e3 * first - median), 1e3 * host, len(times))


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    times = sorted(times)
    median, low, high = (times[min(len(times) - 1, int(len(times) * share))] for share in (0.5, 0.2, 0.8))
    return median, low, high


def _gpu_times(run: Callable[[], Any], device: torch.device, repeats: int, host_s: float) -> list[float]:
    cache = torch.zeros(_CACHE_BYTES // 4, dtype=torch.int32, device=device)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for _ in range(3):
        run()
    for start, end in zip(starts, ends, strict=True):
        cache.sum()
        # The device spins (at about 2 GHz) until the host has enqueued the complete call.
        torch.cuda._sleep(int(1.5 * host_s * 2e9))
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def cpu_times(run: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished everything enqueued; nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Collect garbage and return torch's cached blocks to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def extra_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes allocated during `run` beyond what was allocated before it; None on CPU, where torch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, bytes read and written counted: the limit for moving data here."""
    count = 1 << (29 if device.type == "cuda" else 24)
    source = torch.randn(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (measure(lambda: target.copy_(source), device).median_ms / 1e3)
