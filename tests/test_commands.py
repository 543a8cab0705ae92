"""Commands that README, docs and `--help` show are run from the wheel; README's figures of the demo are today's."""

import json
import re
from pathlib import Path

import pytest

from tests import commands

README = (commands.ROOT / "README.md").read_text(encoding="utf-8")
ALL = [command for path in commands.PAGES for command in commands.of_page(path)] + commands.of_help()
QUICK = [command for command in ALL if not command.minutes]

# Losses of the first steps of recipes/tiny.yaml, and what the same run, all 400 steps of it, ended with: loss and val_loss
# (AMD EPYC with AVX2, torch 2.13.0+cpu, 2026-11-28; one thread and two give the same digits).
# Where the first no longer hold, run `python -m tests.commands demo` and take README's lines and these figures from it.
FIRST = (9.0308, 9.0271, 8.9932, 9.0112)
LAST = (5.5097, 5.8199)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    with commands.Shell(commands.build_wheel(tmp_path_factory.mktemp("wheel"))) as shell:
        yield shell


@pytest.fixture(scope="module")
def prepared(shell, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader") / "prepared"
    commands.prepare(shell, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", dict.fromkeys(command.page for command in QUICK))
def test_commands_that_are_shown_can_be_typed(page, shell, prepared, tmp_path):
    folder = commands.fresh(prepared, tmp_path / "reader")
    failed = []
    for command in QUICK:
        if command.page == page:
            code, _, printed = shell.run(command.line, folder)
            failed += [f"{command.line}: exit {code}\n{printed}"] if code else []
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["data", "recipes", "tokenizer"])
def test_examples_about_what_ships_need_no_file(page, shell, tmp_path):
    """In an empty folder, one after another as they are printed; `my-tokenizer` is what another example makes."""
    own = ("my-tokenizer", "corpus/ ")
    lines = [command.line for command in QUICK if command.page == f"help {page}"]
    lines = [line for line in lines if not any(name in line for name in own)]
    assert len(lines) >= 1
    for line in lines:
        code, _, printed = shell.run(line, tmp_path)
        assert code == 0, f"{line}: {printed}"


@pytest.mark.slow
def test_the_demo_of_the_readme_is_todays(shell, tmp_path):
    """Its first steps are run; its end is compared with the recorded run that began with these steps."""
    code, _, printed = shell.run(
        "tnllm train tiny --set train.max_steps=4 --set log.every_steps=1 --out demo", tmp_path
    )
    assert code == 0, printed
    rows = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    # README shows four decimals. Another kind of CPU sums fp32 products in another order: 1e-7 of the loss in a step, which
    # four updates do not grow to half of the last decimal, so one unit of it is allowed for rounding.
    assert losses == pytest.approx(FIRST, abs=1e-4)
    first, *_, last = commands.step_losses(README)
    assert (first, last, commands.validation_losses(README)[-1]) == (FIRST[0], *LAST)


@pytest.mark.slow
def test_the_wheel_holds_the_page_of_serve(shell, tmp_path):
    """All of its files, and the licence of the one that is not ours."""
    listing = 'from tnllm import assets; print(*[path.name for path in (assets.folder() / "web").iterdir()])'
    code, _, printed = shell.run(f"python -c '{listing}'", tmp_path)
    names = {path.name for path in (commands.ROOT / "tnllm/assets/web").iterdir()}
    assert (code, set(printed.split())) == (0, names) and {"index.html", "main.js", "marked.LICENSE"} <= names


def test_exceptions_of_help_are_still_needed():
    import typer

    from tnllm.cli.main import app

    group = typer.main.get_command(app)
    epilogs = [command.epilog or "" for command in [group, *group.commands.values()]]
    assert not [part for part in commands.NOT_RUN if not any(part in text for text in epilogs)]


def test_marked_blocks_become_commands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- runs -->\n```\ntnllm a \\\n  --b  # why\n# a remark\n\ntnllm c 'x#y'\n```\n\n```\nnot this\n```\n"
        "<!-- runs, minutes -->\n```\n$ tnllm d\nwhat it prints\n```\n<!-- runs -->\n```python\nprint('e')\n```\n"
    )
    lines = [(command.line, command.minutes) for command in commands.of_page(page)]
    assert lines[:3] == [("tnllm a --b", False), ("tnllm c 'x#y'", False), ("tnllm d", True)]
    assert len(lines) == 4 and lines[3][0].startswith("python -c ")


def test_every_mark_is_followed_by_a_block():
    for path in commands.PAGES:
        text = path.read_text(encoding="utf-8")
        assert text.count("<!-- runs") == len(commands._BLOCK.findall(text)), path.name
        assert not re.search(r"<!-- *runs(?!( -->|, minutes -->))", text), path.name


def test_the_shell_reports_codes_and_output(shell, tmp_path):
    code, seconds, printed = shell.run("tnllm recipes show nothing", Path(tmp_path))
    assert code == 2 and seconds > 0 and "nothing" in printed
    assert shell.run("false | cat", Path(tmp_path))[0] == 1
    assert shell.run("tnllm --version", Path(tmp_path))[2].startswith("tnllm ")
