"""Ctrl-C ends a command with 130 and one line, whenever it comes and whoever catches it on the way."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tnllm import interrupts
from tnllm.progress import Progress

ROOT = Path(__file__).parent.parent

# Python imports it at its start. Ctrl-C comes when the module is looked for, or when the process is about to end.
SITE = """
import atexit, os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
if os.environ["INTERRUPT_AT"] == "exit":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
"""
# As pip's script does it, and as `python -m` does.
SCRIPT = ["-c", "import sys; from tnllm.__main__ import main; sys.exit(main())"]
MODULE = ["-m", "tnllm"]


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        (MODULE, "tnllm.interrupts"),
        (MODULE, "typer"),
        (SCRIPT, "tnllm.cli.main"),
        (SCRIPT, "tnllm.cli.bench_serve"),
        (SCRIPT, "tnllm.data.inspect"),
        (MODULE, "numpy"),
        (MODULE, "exit"),
    ],
)
def test_ctrl_c_while_the_command_starts_or_ends(tmp_path, how, moment):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    (tmp_path / "corpus.txt").write_text("Once\n")
    environment = os.environ | {"INTERRUPT_AT": moment, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, *how, "data", "inspect", tmp_path / "corpus.txt"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    # The handler is not there yet while its own module is looked for.
    line = "" if moment == "tnllm.interrupts" else "tnllm: stopped by Ctrl-C\n"
    assert (done.returncode, done.stderr) == (130, line)


def test_both_ways_to_start_are_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"tnllm": "tnllm.__main__:main"}


class CtrlCInItsFinaliser:
    """Python drops what a finaliser raises."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def dropped_in_a_finaliser() -> None:
    CtrlCInItsFinaliser()


def caught_by_a_library() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def turned_into_another_error() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("initialization failed without raising an exception") from None


def work_of_many_steps() -> None:
    with Progress() as progress:
        for step in range(100):
            progress.update("work", step, 100)
    raise AssertionError("it went on to the end")


def work_that_never_asks() -> None:
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("lose", "work"),
    [
        (dropped_in_a_finaliser, work_of_many_steps),
        (dropped_in_a_finaliser, work_that_never_asks),
        (dropped_in_a_finaliser, lambda: None),
        (caught_by_a_library, work_of_many_steps),
        (caught_by_a_library, lambda: None),
        (turned_into_another_error, lambda: None),
    ],
)
def test_a_lost_ctrl_c_is_raised_again(lose, work, capsys):
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        lose()
        work()
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == (before, hook)
    assert capsys.readouterr().err == ""
    # What runs later in this process was not interrupted.
    interrupts.check()


def test_work_goes_on_after_a_handled_ctrl_c():
    with interrupts.raised():
        caught_by_a_library()
        interrupts.handled()
        with Progress() as progress:
            progress.update("work", 1, 2)


def test_clearing_up_may_take_steps():
    cleared = []
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            interrupts.check()
            cleared.append(True)
    assert cleared
    interrupts.check()


def test_an_ignored_ctrl_c_stays_ignored():
    """As in a process that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.leave_at_once()
        with interrupts.raised():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
