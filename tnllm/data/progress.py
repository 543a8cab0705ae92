"""Progress of long data work on stderr: a bar on a terminal, plain lines otherwise.

with progress_on_stderr("tokenize") as report:
    report(Status(done_bytes=1 << 20, total_bytes=9 << 20, documents=12, tokens=3456))
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tnllm.files import format_bytes, format_count, format_duration

_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Status:
    """How far a job is: bytes of input as stored, and what came of them."""

    done_bytes: int
    total_bytes: int
    documents: int = 0
    tokens: int = 0


Report = Callable[[Status], None]


@contextmanager
def progress_on_stderr(title: str) -> Iterator[Report]:
    """A function to call with each new `Status`; what it shows is gone or finished when the block ends."""
    if sys.stderr.isatty():
        with _bar(title) as report:
            yield report
        return
    start = last = time.monotonic()

    def report_line(status: Status) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            print(f"{title}: {describe(status, now - start)}", file=sys.stderr, flush=True)

    yield report_line


def describe(status: Status, elapsed_s: float) -> str:
    """One line: bytes, documents, tokens, speed and time left."""
    rate = status.done_bytes / max(elapsed_s, 1e-9)
    left_s = (status.total_bytes - status.done_bytes) / rate if rate else float("inf")
    return (
        f"{format_bytes(status.done_bytes)} of {format_bytes(status.total_bytes)}, "
        f"{format_count(status.documents)} documents, {format_count(status.tokens)} tokens, "
        f"{format_bytes(rate)}/s, {format_duration(left_s)} left"
    )


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, counts="")

        def report(status: Status) -> None:
            counts = f"{format_count(status.documents)} documents, {format_count(status.tokens)} tokens"
            progress.update(task, total=status.total_bytes, completed=status.done_bytes, counts=counts)

        yield report
