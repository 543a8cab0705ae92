"""The log lines of a run, on stderr and in train.log, and a live progress bar on a terminal.

with RunDisplay(out / "train.log", total_steps=1000) as display:
    display.log("resumed from step 200")
    display.row(row)            # of metrics.jsonl
"""

import os
import time
from pathlib import Path
from typing import Any

from tnllm.files import format_count, format_duration
from tnllm.progress import Progress


class RunDisplay:
    """Reports a run of `total_steps`. Use as a context manager, so that the terminal is always restored.

    `quiet` reports nothing: of several ranks only the first reports.
    """

    def __init__(self, log_file: Path, total_steps: int, quiet: bool = False) -> None:
        self.total_steps, self._quiet = total_steps, quiet
        self._file = open(os.devnull if quiet else log_file, "a", encoding="utf-8")
        # The lines of a run are its logged steps.
        self._progress = Progress(lines=False, quiet=quiet)
        self._status = ""

    def __enter__(self) -> "RunDisplay":
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()
        self._file.close()

    def log(self, text: str) -> None:
        """Write one line to stderr and train.log."""
        if self._quiet:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"{stamp} {text}\n")
        self._file.flush()
        self._progress.log(text)

    def advance(self, step: int) -> None:
        """Move the bar; does nothing if stderr is not a terminal."""
        self._progress.update("step", step, self.total_steps, self._status)

    def row(self, row: dict[str, Any]) -> None:
        """Log a row of metrics.jsonl as one line."""
        step = f"step {row['step']:>{len(str(self.total_steps))}}/{self.total_steps}"
        if "val_loss" in row:
            right = f"  accuracy {row['val_accuracy']:.1%}" if "val_accuracy" in row else ""
            self.log(f"{step}  val_loss {row['val_loss']:.4f}  val_bpb {row['val_bpb']:.4f}{right}")
            return
        if "loss" not in row:
            scores = (
                f"{key.removeprefix('tasks/')} {value:.4f}" for key, value in row.items() if key.startswith("tasks/")
            )
            self.log(f"{step}  {'  '.join(scores)}")
            return
        left = (self.total_steps - row["step"]) * row["tokens_per_step"] / max(row["tokens_per_s"], 1e-9)
        sheet = "unknown" if row.get("mfu_sheet") is None else f"{row['mfu_sheet']:.1%}"
        mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%} (data sheet {sheet})"
        status = (
            f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{format_count(row['tokens_per_s'])} tok/s{mfu}  mem {row['mem_gib']:.2f} GiB"
        )
        self._status = (
            f"loss {row['loss']:.3f}  {format_count(row['tokens_per_s'])} tok/s{mfu}  {row['mem_gib']:.1f} GiB"
        )
        self.advance(row["step"])
        self.log(f"{step}  {status}  left {format_duration(left)}")
