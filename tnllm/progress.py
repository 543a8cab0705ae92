"""Progress of long work on stderr: a bar on a terminal, a plain line every few seconds otherwise.

with Progress() as progress:
    for done, row in enumerate(rows, 1):
        progress.update("scoring", done, len(rows))
with corpus_progress("tokenize") as report:     # for what reads a corpus and reports a `Status`
    report(Status(done_bytes=1 << 20, total_bytes=9 << 20, documents=12, tokens=3456))
log("a line for the person at the terminal")
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tnllm import interrupts
from tnllm.files import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    import rich.progress

_LINE_EVERY_S = 5.0


def log(text: str) -> None:
    """Print a line on stderr; ranks of torchrun above 0 print nothing."""
    if _is_first_rank():
        print(text, file=sys.stderr, flush=True)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """Shows how far work is. Use as a context manager, so that the terminal is always restored.

    `lines`: whether to print lines where stderr is not a terminal. `announce`: whether to name each stage there as it
    begins. `quiet` shows nothing; so does every rank of torchrun but the first.
    """

    def __init__(self, lines: bool = True, announce: bool = False, quiet: bool = False) -> None:
        self._lines, self._announce = lines, announce
        self._quiet = quiet or not _is_first_rank()
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._stage: str | None = None
        # Time and amount of the stage's first update: a resumed stage begins above 0, and its speed counts from there.
        self._first = (0.0, 0)
        self._last_line = 0.0

    def __enter__(self) -> "Progress":
        self._last_line = time.monotonic()
        if not self._quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _new_bar()
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def log(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            log(text)

    def update(self, stage: str, done: int, total: int, detail: object = "", unit: str = "") -> None:
        """`done` of `total` units of `stage` are done; `unit="bytes"` shows KiB, MiB ... A new stage ends the one before.

        `detail` is made into text only when it is shown, so that an update for each document is cheap.
        """
        interrupts.check()
        if self._quiet:
            return
        amounts, now = _Amounts(done, total, detail, unit), time.monotonic()
        if stage != self._stage:
            self._begin(stage, amounts, now)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, amounts=amounts)
        elif self._lines and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            start, done_before = self._first
            self.log(f"{stage}: {amounts}{amounts.speed(now - start, done - done_before)}")

    def _begin(self, stage: str, amounts: "_Amounts", now: float) -> None:
        self._stage, self._first = stage, (now, amounts.done)
        if self._bar is None:
            if self._announce:
                self.log(f"{stage} ...")
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(stage, amounts=amounts)


@dataclass(frozen=True)
class _Amounts:
    done: int
    total: int
    detail: object
    unit: str

    def __str__(self) -> str:
        if self.unit == "bytes":
            text = f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        else:
            text = f"{self.done:,} of {self.total:,} {self.unit}".rstrip()
        return f"{text}, {detail}" if (detail := str(self.detail)) else text

    def speed(self, elapsed_s: float, done: int) -> str:
        """Rate and time left, after `done` units in `elapsed_s`; empty before any time has passed."""
        if elapsed_s <= 0:
            return ""
        rate = done / elapsed_s
        left_s = (self.total - self.done) / rate if rate else float("inf")
        return (
            f", {format_bytes(rate) if self.unit == 'bytes' else format_count(rate)}/s, {format_duration(left_s)} left"
        )


def _new_bar() -> "rich.progress.Progress":
    # Imported here, so that `tnllm --help` does not pay for it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[amounts]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # rich prints what it redirects to stderr: right on a terminal, wrong for a file or a pipe.
        redirect_stdout=sys.stdout.isatty(),
    )


@dataclass(frozen=True)
class Status:
    """How far reading a corpus is: bytes of input as stored, and what came of them. Its text is the counts."""

    done_bytes: int
    total_bytes: int
    documents: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        tokens = f", {format_count(self.tokens)} tokens" if self.tokens else ""
        return f"{format_count(self.documents)} documents{tokens}"


Report = Callable[[Status], None]


@contextmanager
def corpus_progress(title: str) -> Iterator[Report]:
    """A function to call with each new `Status`."""
    with Progress() as progress:
        yield lambda status: progress.update(title, status.done_bytes, status.total_bytes, status, "bytes")


class ScoringProgress:
    """Shows texts that are scored while they are read: reading is ahead, by a text that may take hours."""

    def __init__(self, report: Report) -> None:
        self._report, self._read, self._bytes = report, Status(0, 0), 0

    def on_read(self, status: Status) -> None:
        """The corpus is read up to here."""
        self._read = status

    def on_text(self, text: str) -> None:
        """This text is to be scored."""
        self._bytes += len(text.encode())

    def on_scored(self, tokens: int, num_bytes: int) -> None:
        """So many tokens are scored, which stand for `num_bytes` bytes of the texts."""
        share = min(1.0, num_bytes / max(self._bytes, 1))
        self._report(replace(self._read, done_bytes=int(share * self._read.done_bytes), tokens=tokens))
