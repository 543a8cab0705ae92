"""What an engine has done and is doing, as Prometheus text (exposition format 0.0.4).

metrics.generated_tokens += 8
print(metrics.text())
"""

import math
import os
import time
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tnllm.serving.engine import Engine

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Histogram:
    """Seconds, counted by size."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self.total = 0.0
        self.count = 0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self.total += seconds
        self.count += 1

    def lines(self, name: str) -> list[str]:
        """Its samples."""
        sums = [sum(self._counts[: index + 1]) for index in range(len(self._counts))]
        bounds = [*map(str, _BOUNDS_S), "+Inf"]
        buckets = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, sums, strict=True)]
        return [*buckets, f"{name}_sum {self.total:.6f}", f"{name}_count {self.count}"]


class Metrics:
    """Written by the engine's thread, read by any."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.started = time.time()  # seconds since 1970
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.refused = self.cancelled = self.failed = 0
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "eos": 0})
        self.queue_s, self.first_token_s, self.step_s, self.request_s = (Histogram() for _ in range(4))

    def seconds_to_turn(self) -> int:
        """When a request that is refused now may come again: about when a slot's turn comes; 1 to 60."""
        mean = self.request_s.total / self.request_s.count if self.request_s.count else 1.0
        return min(60, max(1, math.ceil(mean * self._engine.num_waiting / self._engine.num_slots)))

    def text(self) -> str:
        """Every metric."""
        engine = self._engine
        out: list[str] = []

        def add(name: str, kind: str, help: str, lines: list[str]) -> None:
            out.extend([f"# HELP {name} {help}", f"# TYPE {name} {kind}", *lines])

        def value(name: str, kind: str, help: str, number: float) -> None:
            add(name, kind, help, [f"{name} {number:g}" if isinstance(number, float) else f"{name} {number}"])

        value("tnllm_requests_waiting", "gauge", "Requests in the queue.", engine.num_waiting)
        value("tnllm_requests_active", "gauge", "Prompts being read and samples being decoded.", engine.num_active)
        value("tnllm_slots", "gauge", "Samples that can be decoded together.", engine.num_slots)
        value("tnllm_slots_free", "gauge", "Slots nobody is in.", engine.slots.free)
        value("tnllm_prefix_cache_bytes", "gauge", "Bytes of kept contexts.", engine.cache.num_bytes)
        value("tnllm_prefix_cache_entries", "gauge", "Kept contexts.", len(engine.cache))
        value("tnllm_prompt_tokens_total", "counter", "Prompt tokens read.", self.prompt_tokens)
        value("tnllm_cached_tokens_total", "counter", "Prompt tokens found in the prefix cache.", self.cached_tokens)
        value("tnllm_generated_tokens_total", "counter", "Tokens generated.", self.generated_tokens)
        value("tnllm_requests_refused_total", "counter", "Requests refused because the queue was full.", self.refused)
        value("tnllm_requests_cancelled_total", "counter", "Requests whose client went away.", self.cancelled)
        value("tnllm_samples_failed_total", "counter", "Samples that ended with an error.", self.failed)
        if (resident := _resident_bytes()) is not None:
            value("process_resident_memory_bytes", "gauge", "Resident memory of the server.", resident)
        name = "tnllm_samples_finished_total"
        lines = [f'{name}{{reason="{reason}"}} {count}' for reason, count in sorted(self.finished.items())]
        add(name, "counter", "Samples that ended, by reason.", lines)
        for name, help, histogram in (
            ("tnllm_queue_seconds", "From submission to the start of reading.", self.queue_s),
            ("tnllm_first_token_seconds", "From submission to the first token.", self.first_token_s),
            ("tnllm_step_seconds", "One look at the device: a few tokens of every row.", self.step_s),
            ("tnllm_request_seconds", "From submission to the end of the last sample.", self.request_s),
        ):
            add(name, "histogram", help, histogram.lines(name))
        return "\n".join(out) + "\n"


def _resident_bytes() -> int | None:
    """Memory of this process; None where there is no /proc."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
