"""A profile of a few training steps: operators, their times, and allocations.

    profile = Profile(run / "profile", steps=3, device=device, log=display.log)
    profile.step()      # after each training step
    profile.close()     # at the end of the run, however short it was

Writes trace.json.gz (open it in https://ui.perfetto.dev), operators.txt (a table, the costliest first) and, on a GPU,
memory.pickle (every allocation, for https://docs.pytorch.org/memory_viz). Profiled steps are slower.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as Profiler

# By then compilation, first allocations and the choice of kernels are done.
_SKIP = 3
_MEMORY_EVENTS = 200_000


class Profile:
    """Profiles `steps` steps (0: none) after the first three of this process."""

    def __init__(self, folder: Path, steps: int, device: torch.device, log: Callable[[str], None]) -> None:
        self._folder, self._steps, self._device, self._log = folder, steps, device, log
        self._seen = 0
        self._running: Profiler | None = None

    def step(self) -> None:
        """Count a finished step; starts or ends the profile when it is time."""
        self._seen += 1
        if self._steps and self._seen == _SKIP:
            self._start()
        elif self._seen == _SKIP + self._steps:
            self.close()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._running = Profiler(activities=activities, record_shapes=True, profile_memory=True)
        self._running.start()

    def close(self) -> None:
        if self._running is None:
            return
        profiler, self._running = self._running, None
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=40)
        (self._folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
        written = ["trace.json.gz (ui.perfetto.dev)", "operators.txt"]
        if cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            written.append("memory.pickle (docs.pytorch.org/memory_viz)")
        self._log(f"profile of {self._seen - _SKIP} steps in {self._folder}: {', '.join(written)}")
