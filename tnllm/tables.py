"""Tables on stdout: fitted to a terminal of any width, tab-separated in a pipe; and JSON.

print_table(["name", "parameters"], [["tiny", "1.92M"]], right=["parameters"])
print_json({"name": "tiny"})
"""

import codecs
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

# A column of text may shrink to this many characters; where that is not enough, each row becomes lines of its own.
_NARROWEST = 24


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Collection[str] = (),
    title: str = "",
    styles: Mapping[str, str] | None = None,
    lines_above: Collection[int] = (),
) -> None:
    """Print one table.

    `right`: columns of numbers. `styles`: rich's style for cells of a text, such as {"wrong": "red"}. `lines_above`: rows
    with a line above them. A terminal too narrow for columns gets a paragraph for each row. A pipe gets the names and the
    rows, cells separated by tabs: nothing is cut, padded or drawn.
    """
    if not sys.stdout.isatty() or find_spec("rich") is None:
        heads = [columns] if any(columns) else []
        plain = [[" ".join(cell.split()) for cell in row] for row in [*heads, *rows]]
        lines = [*([title] if title else []), *map("\t".join, plain)]
        print("\n".join(lines))
        return
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    texts = [[Text(text, (styles or {}).get(text, "")) for text in row] for row in rows]
    if title:
        console.print(title, markup=False, highlight=False)
    natural = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    # rich narrows the widest columns first, and puts three characters between two columns.
    if sum(min(width, _NARROWEST) for width in natural) + 3 * (len(columns) - 1) > console.width:
        for row in texts:
            _print_paragraph(console, columns, row)
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    for index, cells in enumerate(texts):
        if index in lines_above:
            table.add_section()
        table.add_row(*cells)
    console.print(table)


def _print_paragraph(console: Any, columns: Sequence[str], row: Sequence[Any]) -> None:
    """The first cell (and the second, if the first has no name) as a heading; below it the others that say something."""
    from rich.padding import Padding
    from rich.text import Text

    heads = 2 if len(columns) > 2 and not columns[0] else 1
    console.print(Text(" ").join(cell for cell in row[:heads] if cell.plain), style="bold")
    line = Text()
    for column, cell in zip(columns[heads:], row[heads:], strict=True):
        if not cell.plain:
            continue
        item = Text.assemble((f"{column}: " if column else "", "dim"), cell)
        # Short cells share a line.
        if line.plain and line.cell_len + item.cell_len + 5 > console.width:
            console.print(Padding(line, (0, 0, 0, 2)))
            line = Text()
        line = Text.assemble(line, "   ", item) if line.plain else item
    if line.plain:
        console.print(Padding(line, (0, 0, 0, 2)))


def print_json(value: Any, **options: Any) -> None:
    """Print one line of JSON; `options` are those of json.dumps.

    An encoding that does not hold every character gets escapes, so that no value changes.
    """
    encoding = codecs.lookup(sys.stdout.encoding or "utf-8").name
    print(json.dumps(value, ensure_ascii=not encoding.startswith("utf"), **options), flush=True)
