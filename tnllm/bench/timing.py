"""Honest timing: compile and warm up first, then medians with their spread; bandwidth and peak memory measured.

timing = measure(lambda: f(x), device)     # Timing(median_ms, low_ms, high_ms, compile_ms, host_ms)
bandwidth = copy_bandwidth(device)         # bytes/s, reads and writes counted
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Read before every repetition on a GPU, so that no input is found in its cache. Writing would leave the cache full of
# lines that go back to memory while the timed call runs: 40 MB or more, as much as a small call moves itself.
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile; what the first call took beyond it; the host's part of a call.

    On a GPU the first three are the device's time, with the host running ahead as it does in a training step; where
    `host_ms` is larger, single calls wait for the host.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    compile_ms: float
    host_ms: float


def measure(run: Callable[[], Any], device: torch.device, budget_s: float = 0.5, most: int = 200) -> Timing:
    """Time `run` until `budget_s` is spent: at least 5 and at most `most` repetitions."""
    started = time.perf_counter()
    run()
    _wait(device)
    first = time.perf_counter() - started
    started = time.perf_counter()
    run()
    host = time.perf_counter() - started
    _wait(device)
    again = time.perf_counter() - started
    repeats = int(min(most, max(5, budget_s / max(again, 1e-6))))
    times = _on_gpu(run, device, repeats, host) if device.type == "cuda" else _on_cpu(run, repeats)
    times.sort()
    median, low, high = (times[min(repeats - 1, int(repeats * share))] for share in (0.5, 0.2, 0.8))
    return Timing(median, low, high, max(0.0, 1e3 * first - median), 1e3 * host)


def _on_gpu(run: Callable[[], Any], device: torch.device, repeats: int, host_s: float) -> list[float]:
    cache = torch.zeros(_CACHE_BYTES // 4, dtype=torch.int32, device=device)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for _ in range(3):
        run()
    for start, end in zip(starts, ends, strict=True):
        cache.sum()
        # The device idles (at about 2 GHz) until the host has enqueued the whole call.
        torch.cuda._sleep(int(1.5 * host_s * 2e9))
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _on_cpu(run: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes allocated during `run` beyond what was allocated before it; None on CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, bytes read and written counted: what moving data can reach here."""
    count = 1 << (29 if device.type == "cuda" else 24)
    source = torch.randn(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (measure(lambda: target.copy_(source), device).median_ms / 1e3)
