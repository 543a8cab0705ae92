"""metrics.jsonl: one JSON object per logged step, the source of every other view of a run.

Training rows: step, tokens, loss (nats per counted label), grad_norm, lr, tokens_per_s, mfu and mfu_sheet (shares of
the matrix product rate measured at the start and of the card's data sheet; null where unknown), mem_gib, data_wait_s,
skipped, time (Unix seconds). Validation rows: step, tokens, val_loss, val_bpb, val_accuracy and val_accuracy_by_pairs
(of synthetic tasks), time. Scores of eval.tasks: step, tokens, tasks/NAME/METRIC, time. Spikes of the loss: step, tokens,
spike_loss, usual_loss, first_sample, last_sample, time.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tnllm.files import free_name, write_text_atomic

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends rows to a file (None: discards them), each flushed as written."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else open(path, "a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Make the rows durable."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; an empty list without the file. A damaged line costs itself, and so does one truncated by a kill."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(step := row.get("step")) is int and step >= 0:
            rows.append(row)
    return rows


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def repair_metrics(path: Path, log: Callable[[str], None]) -> None:
    """Remove lines that are no rows, so that new rows start on a line of their own; a copy of the file is kept."""
    rows = read_metrics(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    if len(rows) < len(lines):
        copy = free_name(path.with_suffix(".damaged.jsonl"))
        shutil.copyfile(path, copy)
        write_metrics(path, rows)
        log(f"{path} had {len(lines) - len(rows)} damaged or blank lines, which are left out; {copy.name} is as it was")


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


def cpu_rate(size: int) -> float:
    """FLOP/s of an fp32 product of matrices of that size on this CPU, the fastest of three."""
    a, times = torch.randn(size, size), []
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)
