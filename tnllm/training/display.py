"""What a person sees of a run, on stderr and in train.log: one line per logged step, and a live bar on a terminal."""

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
        self._log = open(os.devnull if quiet else log_file, "a", encoding="utf-8")
        # The lines of a run are its logged steps.
        self._progress = Progress(lines=False, quiet=quiet)
        self._status = ""

    def __enter__(self) -> "RunDisplay":
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()
        self._log.close()

    def say(self, text: str) -> None:
        """One line, to stderr and train.log."""
        if self._quiet:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write(f"{stamp} {text}\n")
        self._log.flush()
        self._progress.log(text)

    def advance(self, step: int) -> None:
        """Move the bar; nothing off a terminal."""
        self._progress.update("step", step, self.total_steps, self._status)

    def row(self, row: dict[str, Any]) -> None:
        """The line of a row of metrics.jsonl."""
        step = f"step {row['step']:>{len(str(self.total_steps))}}/{self.total_steps}"
        if "val_loss" in row:
            self.say(f"{step}  val_loss {row['val_loss']:.4f}  val_bpb {row['val_bpb']:.4f}")
            return
        if "loss" not in row:
            scores = (
                f"{key.removeprefix('tasks/')} {value:.4f}" for key, value in row.items() if key.startswith("tasks/")
            )
            self.say(f"{step}  {'  '.join(scores)}")
            return
        left = (self.total_steps - row["step"]) * row["tokens_per_step"] / max(row["tokens_per_s"], 1e-9)
        mfu = "" if row["mfu"] is None else f"  mfu {row['mfu']:.1%}"
        status = (
            f"loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{format_count(row['tokens_per_s'])} tok/s{mfu}  mem {row['mem_gib']:.2f} GiB"
        )
        self._status = (
            f"loss {row['loss']:.3f}  {format_count(row['tokens_per_s'])} tok/s{mfu}  {row['mem_gib']:.1f} GiB"
        )
        self.advance(row["step"])
        self.say(f"{step}  {status}  left {format_duration(left)}")
