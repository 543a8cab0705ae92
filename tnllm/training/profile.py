"""A look inside a few training steps: what ran, for how long, and what held memory.

    profile = Profile(run / "profile", steps=3, device=device, say=view.say)
    profile.step()      # after each training step
    profile.close()     # at the end of the run, however short it was

Writes trace.json.gz (open it in https://ui.perfetto.dev), operators.txt (a table, the costliest first) and, on a GPU,
memory.pickle (every allocation, for https://docs.pytorch.org/memory_viz). Steps are slower while they are watched.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as Profiler

# Compilation, first allocations and the choice of kernels are over by then.
_SKIP = 3
_MEMORY_EVENTS = 200_000


class Profile:
    """Watches `steps` steps after the first three of this process."""

    def __init__(self, folder: Path, steps: int, device: torch.device, say: Callable[[str], None]) -> None:
        self._folder, self._steps, self._device, self._say = folder, steps, device, say
        self._seen = 0
        self._running: Profiler | None = None

    def step(self) -> None:
        """Note that a step is over."""
        self._seen += 1
        if self._seen == _SKIP:
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
        """Write what was seen, if anything is being watched."""
        if self._running is None:
            return
        found, self._running = self._running, None
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        found.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._folder / "trace.json.gz"))
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=40)
        (self._folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
        written = ["trace.json.gz (ui.perfetto.dev)", "operators.txt"]
        if cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            written.append("memory.pickle (docs.pytorch.org/memory_viz)")
        self._say(f"profile of {self._seen - _SKIP} steps in {self._folder}: {', '.join(written)}")
