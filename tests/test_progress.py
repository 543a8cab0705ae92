import os
import pty
import subprocess
import sys

import pytest

from tnllm import progress
from tnllm.progress import Progress, Status, corpus_progress, log

HALF = Status(done_bytes=5 << 20, total_bytes=10 << 20, documents=1234, tokens=5_000_000)


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that `progress` reads."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_off_a_terminal_a_line_every_few_seconds_says_how_far_how_fast_and_how_long(capsys, clock):
    with corpus_progress("tokenize") as report:
        report(Status(0, 10 << 20))
        clock(1.0)
        report(HALF)
        clock(10.0)
        report(HALF)
        clock(11.0)
        report(HALF)
    line = "tokenize: 5.00 MiB of 10.00 MiB, 1.23K documents, 5M tokens, 512.00 KiB/s, 10.0s left\n"
    assert capsys.readouterr().err == line


def test_the_speed_of_a_resumed_stage_counts_only_what_this_process_did(capsys, clock):
    with Progress() as shown:
        shown.update("score", 900, 1000)
        clock(5.0)
        shown.update("score", 910, 1000)
        clock(10.0)
        shown.update("tasks", 2, 8, unit="tasks")
        clock(15.0)
        shown.update("tasks", 2, 8, unit="tasks")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "score: 910 of 1,000, 2/s, 45.0s left"
    # Before any time has passed there is no speed; without any progress no end is in sight.
    assert lines[1:] == ["tasks: 2 of 8 tasks", "tasks: 2 of 8 tasks, 0/s, ? left"]


def test_stages_are_announced_and_lines_left_out_where_asked(capsys, clock):
    with Progress(lines=False, announce=True) as shown:
        for stage in ("read", "read", "write"):
            clock(100.0)
            shown.update(stage, 1, 2)
        shown.log("[done]")
    assert capsys.readouterr().err.splitlines() == ["read ...", "write ...", "[done]"]


def test_only_the_first_rank_shows_anything(capsys, clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Progress(announce=True) as shown:
        clock(100.0)
        shown.update("step", 1, 2)
        shown.log("a line")
    log("a line")
    assert capsys.readouterr().err == ""


SCRIPT = """
from tnllm.progress import Progress
import sys
with Progress() as progress:
    progress.update("[read]", 1, 4, "7 documents")
    progress._bar.refresh()
    progress.log("kept [line]")
    print("data on stdout")
    progress.update("write", 3 << 20, 4 << 20, unit="bytes")
    progress._bar.refresh()
    {last}
"""


@pytest.mark.parametrize("last", ["pass", "raise KeyboardInterrupt"])
def test_on_a_terminal_there_is_a_bar_that_goes_away_and_the_cursor_comes_back(last):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(last=last)], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:
        pass  # the end of a pseudo-terminal whose other side is closed
    os.close(ours)
    text = shown.decode()
    assert "[read]" in text and "1 of 4, 7 documents" in text and "3.00 MiB of 4.00 MiB" in text
    assert "kept [line]" in text
    assert done.stdout == b"data on stdout\n"
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert text.rindex(show) > text.rindex(hide)
    assert ("KeyboardInterrupt" in text) == (last != "pass")
