"""Charts of the hybrids by length: loss by position in whole novels, and how often a needle is found.

    python -m tests.sweep.length_chart docs/evidence/hybrid

Reads length.csv and needle.csv there (of `tnllm eval ppl --json` and `tnllm eval niah --json`, the cell's name added) and
writes length.png and needle.png. Run it in a checkout.
"""

import csv
import sys
from pathlib import Path
from typing import Any

from tnllm.training.plot import COLORS, new_figure, picture


def _rows(path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each cell, by its group."""
    groups: dict[str, list[dict[str, str]]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["cell"].partition("/")[0], []).append(row)
    return groups


def _label(group: str) -> str:
    """`long-6` is N = 6; `transformer-yarn-32` the Transformer with that rope scaling."""
    number = group.removeprefix("long-")
    if number.isdigit():
        return f"N = {number}"
    scaling, _, factor = group.partition("transformer-")[2].partition("-")
    return f"Transformer, {scaling} {factor}" if scaling else "Transformer"


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": "--" if index >= len(COLORS) else "-", "marker": "o"}


def draw(folder: Path) -> None:
    """Write both charts."""
    with new_figure(6.5, 4.2) as figure:
        axes = figure.subplots()
        axes.set_title("Twelve held-out novels, models of rows of 2,048", loc="left")
        for index, (group, rows) in enumerate(_rows(folder / "length.csv").items()):
            points = [(int(row["to"]) + 1, float(row["bits_per_byte"])) for row in rows if int(row["from"]) >= 256]
            axes.plot(*zip(*points, strict=True), markersize=4, label=_label(group), **_style(index))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
        axes.set_xlabel("tokens from the start of the book, up to")
        axes.set_ylabel("bits per byte")
        axes.legend()
        (folder / "length.png").write_bytes(picture(figure))
    with new_figure(6.5, 4.2) as figure:
        axes = figure.subplots()
        axes.set_title("The right number of ten, needle at a quarter to three quarters", loc="left")
        for index, (group, rows) in enumerate(_rows(folder / "needle.csv").items()):
            shares: dict[int, list[float]] = {}
            for row in rows:
                if row["depth"] in ("25", "50", "75"):
                    shares.setdefault(int(row["length"]), []).append(float(row["chosen"]))
            points = [(length, 100 * sum(found) / len(found)) for length, found in sorted(shares.items())]
            axes.plot(*zip(*points, strict=True), markersize=4, label=_label(group), **_style(index))
        axes.axhline(10, color="0.6", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("chosen, % (dotted: chance)")
        axes.legend()
        (folder / "needle.png").write_bytes(picture(figure))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
