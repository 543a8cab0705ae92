"""Help answers at once and shows by example."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from tnllm.cli.main import PANELS, app


def commands() -> list[list[str]]:
    """Every command line prefix: groups and what is in them."""
    group = typer.main.get_command(app)
    paths = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        paths.append([name])
        paths += [[name, inner] for inner in getattr(command, "commands", {})]
    return paths


def run(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, check=False)


def help_text(words: list[str], columns: int, terminal: bool = False, **variables: str) -> str:
    """What `--help` prints into a pipe, or into a terminal that wide."""
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "xterm", **variables}
    command = [sys.executable, "-m", "tnllm", *words, "--help"]
    if not terminal:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    ours, theirs = os.openpty()
    printed = b""
    with subprocess.Popen(command, stdout=theirs, env=environment):
        os.close(theirs)
        # Linux ends a terminal that no one writes to with an error.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 1 << 16):
                printed += part
    os.close(ours)
    # NO_COLOR leaves bold and dim.
    return re.sub(r"\x1b\[[\d;]*m", "", printed.decode().replace("\r\n", "\n"))


# Prints the names of the modules that a --help needs: of a Typer app with one command, or of ours.
MODULES = """
import contextlib, io, sys, typer
small = typer.Typer(rich_markup_mode="rich")
small.command(rich_help_panel="Panel", epilog="Example")(lambda: None)
with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    if sys.argv[1] == "small":
        small(["--help"], prog_name="small", standalone_mode=False)
    else:
        from tnllm.cli.main import main
        main(["--help"])
assert "--help" in printed.getvalue()
print(*sys.modules)
"""


def test_help_imports_little_more_than_typer_does() -> None:
    """`tnllm --help` answers at once: what takes time is imports, and they can be counted on a busy machine too."""
    small, ours = (run("-c", MODULES, which).stdout.split() for which in ("small", "ours"))
    added = set(ours) - set(small)
    # __mp_main__ is what multiprocessing calls the script.
    packages = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names) - {"__mp_main__"}
    # rich loads its table of character widths when a line first holds one that is not ASCII.
    assert packages <= {"tnllm", "rich"}
    # 367 beside 321, 31 of them this package's. A library of tens of modules, such as numpy or pydantic, is not let in.
    assert len(added) < 0.25 * len(small), sorted(added)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_help_carries_an_example(words: list[str]) -> None:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "110", "NO_COLOR": "1"}, prog_name="tnllm")
    assert done.exit_code == 0, done.output
    examples = [line.strip() for line in done.output.rpartition("Examples:")[2].splitlines() if line.strip()]
    assert any(f"tnllm {words[0]}" in example for example in examples)
    # One a line, so that a line can be copied into a shell.
    assert all(re.match("(tnllm|torchrun) ", example) and " | " not in example for example in examples)


def test_commands_stand_in_panels_in_the_order_people_meet_them() -> None:
    names = [name for names in PANELS.values() for name in names]
    for output in (help_text([], 40), help_text([], 80), help_text([], 40, True), help_text([], 80, True)):
        places = [re.search(rf"^(│|  ?) *{name} ", output, re.M).start() for name in names]  # type: ignore[union-attr]
        assert places == sorted(places)
        assert all(re.search(f"^(╭─ {panel} ─|{panel}:)", output, re.M) for panel in PANELS)
        assert "--debug" in output and "--install-completion" in output


@pytest.mark.parametrize("words", [[], ["data"], ["data", "clean"], ["sweep"]], ids=" ".join)
def test_help_in_a_pipe_and_in_a_narrow_terminal_is_plain(words: list[str]) -> None:
    for columns, terminal in ((40, False), (80, False), (40, True)):
        output = help_text(words, columns, terminal)
        lines = output.splitlines()
        # Of the usage, `inputs...` may end a line; no meaning is cut.
        assert not re.search("[\u2500-\u257f]|\\.\\.\\.$", "\n".join(lines[2:]), re.M)
        assert not [line for line in lines if line != line.rstrip()]
        # Examples stay whole; click sets no text narrower than 50.
        text = lines[: lines.index("  Examples:")]
        assert max(map(len, text)) <= max(columns, 50)
    boxes = help_text(words, 80, True)
    assert "─ Options ─" in boxes
    # Boxes break the words of a line elsewhere, and show the same options.
    assert set(re.findall(r" (--[a-z-]+)", boxes)) == set(re.findall(r" (--[a-z-]+)", output))


@pytest.mark.parametrize("terminal", [False, True])
def test_help_needs_no_colour_and_no_unicode(terminal: bool) -> None:
    output = help_text([], 80, terminal, TERM="dumb", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert "bench-train" in output


def test_the_shell_completes_commands() -> None:
    environment = {**os.environ, "_TNLLM_COMPLETE": "complete_bash", "COMP_WORDS": "tnllm bench-", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'tnllm'; from tnllm.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == list(PANELS["Measure"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["recipe"], "No such command 'recipe'."),
        (["recipes", "show"], "Missing argument 'recipe'"),
        (["estimate", "tiny", "--gpuu", "h100"], "No such option --gpuu"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(args: list[str], message: str) -> None:
    done = run("-m", "tnllm", *args)
    assert done.returncode == 2
    # The parser's words differ a little from version to version: quotes, colons and capital letters.
    words, expected = (re.sub("[':]", "", text).lower() for text in (done.stderr, f"tnllm: {message}"))
    assert words.startswith(expected) and done.stderr.count("\n") == 1
    assert message.startswith("Missing") or re.search("did you mean|possible options", words)
