"""Help answers at once and shows by example."""

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
    output = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "110", "NO_COLOR": "1"}, prog_name="tnllm").output
    names = [name for names in PANELS.values() for name in names]
    places = [re.search(rf"^│ {name} ", output, re.M).start() for name in names]  # type: ignore[union-attr]
    assert places == sorted(places)
    assert all(f"─ {panel} ─" in output for panel in PANELS)
    assert "--debug" in output and "--install-completion" in output


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
