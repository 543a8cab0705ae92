import io
import sys

from tnllm.data import progress
from tnllm.data.progress import Status, describe, progress_on_stderr

HALF = Status(done_bytes=5 << 20, total_bytes=10 << 20, documents=1234, tokens=5_000_000)


def test_a_line_says_how_far_how_fast_and_how_long():
    line = describe(HALF, elapsed_s=10.0)
    assert line == "5.00 MiB of 10.00 MiB, 1.23K documents, 5M tokens, 512.00 KiB/s, 10.0s left"
    assert describe(Status(0, 10), 1.0).endswith("? left")


def test_off_a_terminal_there_are_plain_lines_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress_on_stderr("tokenize") as report:
        for _ in range(3):
            report(HALF)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tokenize: 5.00 MiB of 10.00 MiB")


def test_on_a_terminal_there_is_a_bar_that_goes_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_on_stderr("tokenize") as report:
        report(HALF)
    shown = terminal.getvalue()
    assert "tokenize" in shown and "\x1b[" in shown
