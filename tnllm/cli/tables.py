"""Tables on stdout, coloured and fitted to a terminal, wide and plain in a pipe; and JSON.

print_table("Recipes", ["name", "parameters"], [["tiny", "1.92M"]])
print_json({"name": "tiny"})
"""

import codecs
import json
import sys
from collections.abc import Sequence
from typing import Any


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), note: str = ""
) -> None:
    """Print one table; the columns named in `right` are numbers. Cells may carry rich markup."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if title:
        console.print(title, highlight=False)
    console.print(table)
    if note:
        console.print(note, highlight=False)


def print_json(value: Any, **options: Any) -> None:
    """Print one line of JSON; `options` are those of json.dumps.

    An encoding that does not hold every character gets escapes, so that no value changes.
    """
    encoding = codecs.lookup(sys.stdout.encoding or "utf-8").name
    print(json.dumps(value, ensure_ascii=not encoding.startswith("utf"), **options), flush=True)
