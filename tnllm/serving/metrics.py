"""What an engine has done and is doing, as Prometheus text (exposition format 0.0.4).

metrics = Metrics(lambda: Snapshot(requests_waiting=3, ...))
metrics.generated_tokens += 8
print(metrics.text())
"""

import math
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from tnllm.errors import MissingExtra

try:
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ImportError:
    raise MissingExtra("serve", "prometheus_client") from None

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Snapshot:
    """An engine's gauges at one moment."""

    requests_waiting: int
    requests_active: int
    slots: int
    slots_free: int
    samples_parked: int
    prefix_cache_bytes: int
    prefix_cache_entries: int


class Histogram:
    """Durations in seconds, counted by size."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        """Durations observed."""
        return sum(self._counts)

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and cumulative count of each bucket."""
        return list(zip([*map(str, _BOUNDS_S), "+Inf"], map(float, accumulate(self._counts)), strict=True))


class Metrics:
    """Written by the engine's thread, read by any."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self.started = time.time()  # seconds since 1970
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.refused = self.cancelled = self.failed = self.parks = 0
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "eos": 0})
        self.queue_s, self.first_token_s, self.step_s, self.request_s = (Histogram() for _ in range(4))

    def retry_after_s(self) -> int:
        """Seconds after which a request that is refused now may try again: about when a slot is free; 1 to 60."""
        mean = self.request_s.total / self.request_s.count if self.request_s.count else 1.0
        now = self._snapshot()
        return min(60, max(1, math.ceil(mean * now.requests_waiting / now.slots)))

    def text(self) -> str:
        """Every metric."""
        # A registry of this call alone: the library's own one is shared by the process, where two engines would collide.
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        # The library writes whole numbers as 4.0.
        return re.sub(r"\.0$", "", generate_latest(registry).decode(), flags=re.MULTILINE)

    def collect(self) -> Iterator[Metric]:
        """What a prometheus_client registry asks of a collector."""
        now = self._snapshot()
        for name, help, value in (
            ("requests_waiting", "Prompts in the queue.", now.requests_waiting),
            ("requests_active", "Prompts being read and samples being decoded.", now.requests_active),
            ("slots", "Samples that can be decoded together.", now.slots),
            ("slots_free", "Free slots.", now.slots_free),
            ("samples_parked", "Samples that lost their slot to others and will continue.", now.samples_parked),
            ("prefix_cache_bytes", "Bytes of cached contexts.", now.prefix_cache_bytes),
            ("prefix_cache_entries", "Cached contexts.", now.prefix_cache_entries),
        ):
            yield GaugeMetricFamily(f"tnllm_{name}", help, value)
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens read.", self.prompt_tokens),
            ("cached_tokens", "Prompt tokens found in the prefix cache.", self.cached_tokens),
            ("generated_tokens", "Tokens generated.", self.generated_tokens),
            ("requests_refused", "Requests refused because the queue was full.", self.refused),
            ("requests_cancelled", "Requests whose client disconnected.", self.cancelled),
            ("parks", "Times a sample lost its slot to others.", self.parks),
            ("samples_failed", "Samples that ended with an error.", self.failed),
        ):
            yield CounterMetricFamily(f"tnllm_{name}", help, value)
        finished = CounterMetricFamily("tnllm_samples_finished", "Samples that ended, by reason.", labels=["reason"])
        for reason, count in sorted(self.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        for name, help, histogram in (
            ("queue_seconds", "From submission to the start of reading.", self.queue_s),
            ("first_token_seconds", "From submission to the first token.", self.first_token_s),
            ("step_seconds", "Between two synchronisations with the device: a few tokens of every row.", self.step_s),
            ("request_seconds", "From submission to the end of the last sample.", self.request_s),
        ):
            yield HistogramMetricFamily(f"tnllm_{name}", help, histogram.buckets(), histogram.total)
