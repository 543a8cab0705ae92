"""Charts of the hybrids by length: loss by position in whole novels, and how often a needle is found.

    python -m tests.sweep.length_chart docs/evidence/hybrid

Reads length.csv and needle.csv there (of `tnllm eval ppl --json` and `tnllm eval niah --json`, the cell's name added) and
writes length.png and needle.png. Run it in a checkout.
"""

import csv
import sys
from pathlib import Path

from tnllm.training.plot import COLORS, new_figure, picture


def _rows(path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each cell, by its group."""
    groups: dict[str, list[dict[str, str]]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["cell"].partition("/")[0], []).append(row)
    return groups


def _label(group: str) -> str:
    number = group.removeprefix("long-")
    return f"N = {number}" if number.isdigit() else "Transformer"


def draw(folder: Path) -> None:
    """Write both charts."""
    with new_figure(6.5, 4.2) as figure:
        axes = figure.subplots()
        axes.set_title("Twelve held-out novels, models of rows of 2,048", loc="left")
        for color, (group, rows) in zip(COLORS, _rows(folder / "length.csv").items(), strict=False):
            points = [(int(row["to"]) + 1, float(row["bits_per_byte"])) for row in rows if int(row["from"]) >= 256]
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=_label(group))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K")
        axes.set_xlabel("tokens from the start of the book, up to")
        axes.set_ylabel("bits per byte")
        axes.legend()
        (folder / "length.png").write_bytes(picture(figure))
    with new_figure(6.5, 4.2) as figure:
        axes = figure.subplots()
        axes.set_title("The right number of ten, needle at a quarter to three quarters", loc="left")
        for color, (group, rows) in zip(COLORS, _rows(folder / "needle.csv").items(), strict=False):
            shares: dict[int, list[float]] = {}
            for row in rows:
                if row["depth"] in ("25", "50", "75"):
                    shares.setdefault(int(row["length"]), []).append(float(row["chosen"]))
            points = [(length, 100 * sum(found) / len(found)) for length, found in sorted(shares.items())]
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=_label(group))
        axes.axhline(10, color="0.6", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("chosen, % (dotted: chance)")
        axes.legend()
        (folder / "needle.png").write_bytes(picture(figure))


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
