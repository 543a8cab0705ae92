"""The one report writer of all benchmarks: rows → tables, lines, JSON, CSV and charts.

    columns = [("provider", "{provider}"), ("T", "{length:tokens}"), ("fwd ms", "{fwd_ms:.2f}")]
    print_table("times", columns, results["rows"])            # a value that is None is shown as -
    write_json(results, path)
    write_csv(results, path)
    draw("title", [Panel("forward (ms)", [("tnllm", [(1024, 0.1), (2048, 0.2)])])], path)

`tnllm.bench.tables` holds what each benchmark shows.
"""

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnllm import files, tables
from tnllm.files import format_bytes, write_bytes_atomic, write_text_atomic
from tnllm.training.plot import COLORS, new_figure, picture

Row = dict[str, Any]
# How a cell is made of a row: a format string, or a function.
Form = str | Callable[[Row], str]
# Names and (x, y) points.
Lines = list[tuple[str, list[tuple[float, float | None]]]]
_COLORS = (*COLORS, "#000000")
_MARKERS = "osD^vP*"


class _Cell(string.Formatter):
    """Formats `{key:spec}` of a row; None or a missing key is `-`, and `tokens` and `bytes` are specs of their own."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Any) -> Any:
        return kwargs.get(key)

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "-"
        special = {"tokens": length_label, "bytes": format_bytes}.get(format_spec)
        return special(value) if special else format(value, format_spec)


def cell(form: Form, row: Row) -> str:
    return _Cell().vformat(form, (), row) if isinstance(form, str) else form(row)


def print_table(
    title: str,
    columns: Sequence[tuple[str, Form]],
    rows: Sequence[Row],
    left: Sequence[str] = ("provider", ""),
    group: Callable[[Row], object] | None = None,
) -> None:
    """Print a table on stdout; columns are numbers but for `left`. A line separates rows of unlike `group`."""
    names = [name for name, _ in columns]
    cells = [[cell(form, row) for _, form in columns] for row in rows]
    groups = [group(row) for row in rows] if group else []
    starts = [index for index in range(1, len(groups)) if groups[index] != groups[index - 1]]
    tables.print_table(names, cells, [name for name in names if name not in left], title, lines_above=starts)


def print_line(columns: Sequence[tuple[str, int, Form]], row: Row | None = None, more: str | None = None) -> None:
    """One line of a table that is printed as it is measured, or its heading without a row.

    A column: name, width (negative: aligned left), form. Columns without a value end the line; `more` comes after it.
    """
    cells = []
    for name, width, form in columns:
        text = name if row is None else cell(form, row)
        cells.append(text.ljust(-width) if width < 0 else text.rjust(width))
    print("  ".join([*cells, more or ""]).rstrip(), flush=True)


def environment_line(environment: Row) -> str:
    """The device with its measured rates and those of its data sheet, then versions and settings."""
    rest = dict(environment)
    device, on_gpu = rest.pop("device"), "sheet_tb_per_s" in rest
    for key, words, unit in (("copy_tb", "copy", "TB/s"), ("matmul_tflop", "bf16 matrix product", "TFLOP/s")):
        sheet = rest.pop(f"sheet_{key.split('_')[1]}_per_s", None)
        if (rate := rest.pop(f"{key}_per_s", None)) is not None:
            share = f"{rate / sheet:.0%} of the data sheet's {sheet:.4g}" if sheet else "data sheet unknown"
            device += f", {words} {rate:.3g} {unit}" + (f" ({share})" if on_gpu else "")
    values = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items())
    return f"{device}; {', '.join(values)}"


def verdict(row: Row) -> str:
    return "ok" if row["passed"] else "WRONG"


def length_label(tokens: int) -> str:
    """`64K`, `1M`: multiples of 1024 by their unit, other numbers as they are."""
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else str(tokens)


def write_json(results: Row, path: Path) -> None:
    write_text_atomic(path, json.dumps(results, indent=2) + "\n")


def write_csv(results: Row, path: Path) -> None:
    """The rows, with the device beside each."""
    about = {key: results["environment"][key] for key in ("device", "dtype")}
    files.write_csv(path, [{**about, **row} for row in results["rows"]])


@dataclass
class Panel:
    """One chart: named lines of (x, y) points, of which those without a y are left out.

    `log`: of the y axis, if the values span a decade. `form`: of its numbers. `dotted`: one more line, without markers.
    """

    ylabel: str
    lines: Lines
    xlabel: str = "sequence length (tokens)"
    log: bool = False
    form: str = ""
    dotted: tuple[str, Sequence[tuple[float, float]]] | None = None


def lines(rows: Sequence[Row], name: Form, x: str, y: str) -> Lines:
    """The rows' points (x, y), one line for each name."""
    series: dict[str, list[tuple[float, float | None]]] = {}
    for row in rows:
        series.setdefault(cell(name, row), []).append((row[x], row.get(y)))
    return list(series.items())


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Write the panels that have points side by side as PNG, SVG or PDF, by the suffix of `path`. Raises MissingExtra."""
    panels = [panel for panel in panels if any(y for _, points in panel.lines for _, y in points)] or panels[:1]
    with new_figure(4.6 * len(panels), 4.2) as figure:
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axis, panel)
            names = [name for name, _ in panel.lines]
            if axis.lines and (panel is panels[0] or names != [name for name, _ in panels[0].lines]):
                axis.legend(fontsize=8.5)
        figure.suptitle(title, fontsize=10)
        write_bytes_atomic(path, picture(figure, path.suffix))


def _draw_panel(axis: Any, panel: Panel) -> None:
    drawn = []
    for index, (name, given) in enumerate(panel.lines):
        if points := sorted((x, y) for x, y in given if y):
            drawn += points
            own = "tnllm" in name or "transnormer" in name
            axis.plot(
                *zip(*points, strict=True),
                label=name,
                color=_COLORS[index % 7],
                marker=_MARKERS[index % 7],
                markersize=4.5,
                linewidth=2.2 if own else 1.4,
                linestyle=("-", "--", ":")[index // 7 % 3],
            )
    if panel.dotted is not None:
        axis.plot(*zip(*panel.dotted[1], strict=True), color="0.5", linestyle=":", label=panel.dotted[0])
    ticks, values = sorted({x for x, _ in drawn}), sorted({y for _, y in drawn})
    axis.set(xscale="log", xlabel=panel.xlabel, ylabel=panel.ylabel)
    axis.set_xticks(ticks, [length_label(int(x)) for x in ticks], rotation=45 if len(ticks) > 8 else 0)
    if panel.form == "tokens":
        axis.set_yscale("log", base=2)
        axis.set_yticks(values, [length_label(int(y)) for y in values])
    elif panel.log and values and values[-1] >= 10 * values[0]:
        axis.set_yscale("log")
    else:
        # A logarithmic axis of less than a decade has no numbers. From zero, so that constant looks constant.
        axis.set_ylim(0, 1.06 * max(values, default=1.0))
        if panel.form:
            axis.yaxis.set_major_formatter(lambda value, _: format(value, panel.form))
    axis.minorticks_off()
