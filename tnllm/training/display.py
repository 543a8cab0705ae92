"""What a person sees of a run, on stderr and in train.log: one line per logged step, and a live bar on a terminal."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tnllm.files import format_count, format_duration


class RunDisplay:
    """Reports a run of `total_steps`. Use as a context manager, so that the terminal is always restored.

    `quiet` reports nothing: of several ranks one speaks.
    """

    def __init__(self, log_file: Path, total_steps: int, quiet: bool = False) -> None:
        self.total_steps, self._quiet = total_steps, quiet
        self._log = open(os.devnull if quiet else log_file, "a", encoding="utf-8")
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> "RunDisplay":
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn("[bold]step"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("step", total=self.total_steps, status="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._log.close()

    def say(self, text: str) -> None:
        """One line, to stderr and train.log."""
        if self._quiet:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write(f"{stamp} {text}\n")
        self._log.flush()
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Move the bar; nothing off a terminal."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

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
        if self._bar is not None:
            short = f"loss {row['loss']:.3f}  {format_count(row['tokens_per_s'])} tok/s{mfu}  {row['mem_gib']:.1f} GiB"
            self._bar.update(self._task, completed=row["step"], status=short)
        self.say(f"{step}  {status}  left {format_duration(left)}")
