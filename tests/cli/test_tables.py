"""Every command that lists something is readable in a narrow terminal, and plain in a pipe."""

import re
import sys

import pytest

from tnllm.tables import print_table

LISTS = (["doctor"], ["recipes", "list"], ["eval", "ls"], ["estimate", "385m"])
DRAWN = re.compile("[\u2500-\u257f]")


@pytest.fixture
def terminal(monkeypatch):
    """Makes what the test prints believe in a terminal of `columns`; returns the function that does."""

    def resize(columns: int) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    return resize


def plain(output: str) -> list[str]:
    """Lines without colour and without the spaces at their ends."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", output).splitlines()]


@pytest.mark.parametrize("words", LISTS, ids=" ".join)
def test_lists_fit_a_narrow_terminal_and_are_plain_in_a_pipe(words: list[str], tnllm, terminal) -> None:
    code, piped, _ = tnllm(*words)
    assert code == 0
    assert "  " not in piped and not DRAWN.search(piped) and "\x1b" not in piped
    assert not [line for line in piped.splitlines() if line.endswith(" ")]
    # The disk's free space changes between two runs, and a paragraph's heading has no name.
    cells = set(re.split(r"[\t\n]", re.sub(r"[\d.]+ GiB free", "", piped))) - {"part", "recipe", "task", "memory"}
    for columns in (40, 80):
        terminal(columns)
        lines = plain(tnllm(*words)[1])
        assert max(map(len, lines)) <= columns
        # Nothing is lost, and no word is broken but one too long for a column.
        shown = " ".join(" ".join(lines).split())
        assert not [word for cell in cells for word in cell.split() if len(word) <= 24 and word not in shown]


def test_a_cell_is_printed_as_it_is(capsys) -> None:
    """Brackets are no markup, and a line break would be a row of its own."""
    print_table(["name", "what"], [["[bold]x[/]", "two\nlines  here"]], title="[1] of [2]")
    assert capsys.readouterr().out == "[1] of [2]\nname\twhat\n[bold]x[/]\ttwo lines here\n"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # Wide enough if the text shrinks to 24 characters; below that, paragraphs whose short cells share a line.
        (60, ["name               parameters   what", "─" * 60]),
        (54, ["tiny-transformer", "  parameters: 1.91M   tokens: 819K"]),
        (30, ["tiny-transformer", "  parameters: 1.91M", "  tokens: 819K", "  what: a very small baseline"]),
    ],
)
def test_columns_become_paragraphs_where_they_do_not_fit(columns, expected, terminal, capsys) -> None:
    terminal(columns)
    names = ["name", "parameters", *(["tokens"] if columns < 60 else []), "what"]
    row = [
        "tiny-transformer",
        "1.91M",
        *(["819K"] if columns < 60 else []),
        "a very small baseline beside the smallest",
    ]
    print_table(names, [row], right=["parameters", "tokens"])
    assert plain(capsys.readouterr().out)[: len(expected)] == expected
