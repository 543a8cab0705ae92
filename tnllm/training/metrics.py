"""metrics.jsonl: one JSON object per logged step, the source of every other view of a run.

Training rows: step, tokens, loss (nats per counted label), grad_norm, lr, tokens_per_s, mfu (null where the device's
peak is unknown), mem_gib, data_wait_s, skipped, time (Unix seconds). Validation rows: step, tokens, val_loss, val_bpb,
time. Scores of eval.tasks: step, tokens, tasks/NAME/METRIC, time. Spikes of the loss: step, tokens, spike_loss,
usual_loss, first_sample, last_sample, time.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from tnllm.errors import MissingExtra
from tnllm.files import write_text_atomic


class MetricsLog:
    """Appends rows to a file (None: discards them), each flushed as written; optionally TensorBoard events beside it."""

    def __init__(self, path: Path | None, resume_step: int, tensorboard: bool = False) -> None:
        """Keep earlier rows up to `resume_step` and drop later ones, so that no step appears twice.

        Raises MissingExtra if `tensorboard` is set and TensorBoard is not installed.
        """
        self._events: Any = None
        self._file: Any = None
        if path is None:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingExtra("track", "tensorboard") from None
            self._events = SummaryWriter(str(path.parent / "tensorboard"), purge_step=resume_step + 1)
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
            write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in row.items():
                if value is not None and key not in ("step", "time"):
                    self._events.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Make the rows durable."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a last line truncated by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def matmul_rate(device: torch.device) -> float | None:
    """FLOP/s of an 8192^3 bf16 product of random matrices: the measured peak behind the `mfu` column.

    The fastest of 12 timings, since power throttling varies by a tenth from run to run. None on CPU, where a training
    step is bound by other things.
    """
    if device.type != "cuda":
        return None
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / min(times)
