"""What an engine has done and is doing, as Prometheus text (exposition format 0.0.4).

metrics = Metrics()
metrics.gauges.append(lambda: {"requests_waiting": 3, ...})
metrics.generated_tokens += 8
print(metrics.text())
"""

import math
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate

from tnllm.errors import optional_import

with optional_import("serve", "prometheus_client"):
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


# What the engine counts at the moment.
_GAUGES = {
    "requests_waiting": "Prompts in the queue.",
    "requests_active": "Prompts being read and samples being decoded.",
    "slots": "Samples that can be decoded together.",
    "slots_free": "Free slots.",
    "samples_parked": "Samples that lost their slot to others and will continue.",
    "prefix_cache_bytes": "Bytes of cached contexts.",
    "prefix_cache_entries": "Cached contexts.",
    "states": "States that are kept.",
    "state_bytes": "Bytes of the states that are kept.",
    "device_memory_peak_bytes": "Most bytes allocated on the GPU at once.",
}
# Attributes of Metrics.
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens read."),
    "cached_tokens": ("cached_tokens", "Prompt tokens found in the prefix cache."),
    "state_tokens": ("state_tokens", "Prompt tokens that a state spared."),
    "states_made": ("states_made", "States made by reading, forking or an upload."),
    "states_refused": ("states_refused", "States refused because there was no room for them."),
    "states_expired": ("states_expired", "States that were deleted because they had not been used for too long."),
    "generated_tokens": ("generated_tokens", "Tokens generated."),
    "refused": ("requests_refused", "Requests refused because the queue was full."),
    "cancelled": ("requests_cancelled", "Requests whose client disconnected."),
    "parks": ("parks", "Times a sample lost its slot to others."),
    "failed": ("samples_failed", "Samples that ended with an error."),
    "grammars": ("requests_with_grammar", "Requests whose text had to fit a schema, an expression or a grammar."),
    "tool_calls": ("tool_calls", "Answers that called a tool."),
}
_HISTOGRAMS = {
    "queue_s": ("queue_seconds", "From submission to the start of reading."),
    "first_token_s": ("first_token_seconds", "From submission to the first token."),
    "step_s": ("step_seconds", "Between two synchronisations with the device: a few tokens of every row."),
    "request_s": ("request_seconds", "From submission to the end of the last sample."),
}


class Histogram:
    """Durations in seconds, counted by size."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and cumulative count of each bucket."""
        return list(zip([*map(str, _BOUNDS_S), "+Inf"], map(float, accumulate(self._counts)), strict=True))


class Metrics:
    """Written by the engine's thread, read by any. `gauges` give values of this moment by name, which are added up."""

    def __init__(self) -> None:
        self.gauges: list[Callable[[], dict[str, int]]] = []
        self.started = time.time()  # seconds since 1970
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.state_tokens = self.states_made = self.states_refused = self.states_expired = 0
        self.refused = self.cancelled = self.failed = self.parks = self.grammars = self.tool_calls = 0
        self.requests: Counter[str] = Counter()  # by model
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "eos": 0})
        self.queue_s, self.first_token_s, self.step_s, self.request_s = (Histogram() for _ in range(4))

    def _now(self) -> Counter[str]:
        values: Counter[str] = Counter()
        for gauges in self.gauges:
            values.update(gauges())
        return values

    def retry_after_s(self) -> int:
        """Seconds after which a request that is refused now may try again: about when a slot is free; 1 to 60."""
        mean = self.request_s.total / self.request_s.count if self.request_s.count else 1.0
        now = self._now()
        return min(60, max(1, math.ceil(mean * now["requests_waiting"] / now["slots"])))

    def text(self) -> str:
        # A registry of this call alone: the library's own one is shared by the process, where two engines would collide.
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        # The library writes whole numbers as 4.0.
        return re.sub(r"\.0$", "", generate_latest(registry).decode(), flags=re.MULTILINE)

    def collect(self) -> Iterator[Metric]:
        """What a prometheus_client registry asks of a collector."""
        for name, value in self._now().items():
            yield GaugeMetricFamily(f"tnllm_{name}", _GAUGES[name], value)
        for attribute, (name, help) in _COUNTERS.items():
            yield CounterMetricFamily(f"tnllm_{name}", help, getattr(self, attribute))
        finished = CounterMetricFamily("tnllm_samples_finished", "Samples that ended, by reason.", labels=["reason"])
        for reason, count in sorted(self.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        requests = CounterMetricFamily("tnllm_requests", "Requests that were queued, by model.", labels=["model"])
        for model, count in sorted(self.requests.items()):
            requests.add_metric([model], count)
        yield requests
        for attribute, (name, help) in _HISTOGRAMS.items():
            histogram = getattr(self, attribute)
            yield HistogramMetricFamily(f"tnllm_{name}", help, histogram.buckets(), histogram.total)
