"""Charts of a sweep, as its file's `charts` name them.

    picture = draw(chart, rows, curves, repeats)      # bytes of a .png

`x: tokens` and `x: time` draw the validation loss along the best cell of each group; where none is done, tokens shows an
unfinished one. Time is tokens over the speed of a cell of the same recipe that ran alone. `x: cell` draws a dot a seed and
a bar at the mean for each choice. `x: parameters` draws the best cell of each recipe, without the embedding's parameters,
and the power law through them; `x: repeats` the loss by distance of tests/sweep/repeats.py; `x: pairs` the best cell's
accuracy by number of pairs. Any other x is a key of the grid.
"""

import math
from collections.abc import Sequence
from statistics import linear_regression
from typing import Any

from tnllm.sweep.plan import Chart, Row
from tnllm.sweep.table import ACCURACY, summarize
from tnllm.training.plot import COLORS, new_figure, picture


def draw(chart: Chart, rows: Sequence[Row], curves: Sequence[Row], repeats: Sequence[Row] = ()) -> bytes | None:
    """The chart as bytes of a PNG file; None where no cell of its groups is done. Needs the extra `plot`."""
    done = [row for row in rows if row["group"] in chart.groups and row["status"] == "done"]
    started = [row for row in curves if _group(row) in chart.groups] if chart.x == "tokens" else []
    if not done and not started:
        return None
    height = max(2.0, 0.26 * len(summarize(done)) + 1.0) if chart.x == "cell" else 4.2
    with new_figure(6.5, height) as figure:
        axes = figure.subplots()
        axes.set_title(chart.title, loc="left")
        axes.set_ylabel("validation loss (nats per token)")
        if chart.x == "cell":
            _dots(axes, done)
        elif chart.x == "parameters":
            _sizes(axes, done)
        elif chart.x == "repeats":
            _repeats(axes, chart, repeats)
        elif chart.x == "pairs":
            _pairs(axes, chart, done)
        elif chart.x in ("tokens", "time"):
            _lines(axes, chart, done, curves, alone_speeds(rows) if chart.x == "time" else None)
        else:
            _against(axes, chart, done)
        if not axes.lines:
            return None
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        return picture(figure)


def alone_speeds(rows: Sequence[Row]) -> dict[str, float]:
    """Tokens/s of each recipe, from cells that ran with nothing beside them."""
    return {
        row["recipe"]: row["tokens_per_s"] for row in rows if str(row["alone"]) == "True" and row["status"] == "done"
    }


def _dots(axes: Any, rows: Sequence[Row]) -> None:
    lines = summarize(rows)
    kind = {row["group"]: row["kind"] for row in rows}
    kinds = sorted(set(kind.values()), reverse=True)
    labels = [f"{line.group}: {line.choice}" if line.choice else line.group for line in lines]
    for index, line in enumerate(lines):
        color = COLORS[kinds.index(kind[line.group])]
        axes.plot(line.losses, [index] * len(line.losses), "o", color=color, markersize=4, alpha=0.5)
        axes.plot([line.loss], [index], "|", color=color, markersize=12)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set(xlabel="validation loss (nats per token)", ylabel="")


def _draw_line(axes: Any, index: int, points: Sequence[tuple[float, Any]], label: str, markersize: float = 4) -> None:
    if points:
        color = COLORS[index % len(COLORS)]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=markersize, label=label)


def _lines(
    axes: Any, chart: Chart, rows: Sequence[Row], curves: Sequence[Row], speeds: dict[str, float] | None
) -> None:
    for index, group in enumerate(chart.groups):
        cells = [row for row in rows if row["group"] == group]
        best = min(cells, key=lambda row: row["val_loss"]) if cells else None
        scale, label = 1e6, group
        if best is not None:
            name = best["cell"]
        elif speeds is None:
            name, label = next((row["cell"] for row in curves if _group(row) == group), None), f"{group} (unfinished)"
        if speeds is not None:
            if best is None or best["recipe"] not in speeds:
                continue
            scale = speeds[best["recipe"]]
        points = [(row["tokens"] / scale, row["val_loss"]) for row in curves if row["cell"] == name]
        _draw_line(axes, index, points, label, markersize=3)
    _log_axis(axes)
    axes.set_xlabel("tokens (millions)" if speeds is None else "time on one GPU, the cell alone (s)")


def power_law(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of the least-squares fit of loss = a * N^-b to points (N, loss), both in logarithms. Needs two sizes."""
    sizes, losses = zip(*points, strict=True)
    slope, intercept = linear_regression([math.log(size) for size in sizes], [math.log(loss) for loss in losses])
    return math.exp(intercept), -slope


def _sizes(axes: Any, rows: Sequence[Row]) -> None:
    for index, kind in enumerate(sorted({row["kind"] for row in rows}, reverse=True)):
        best: dict[str, tuple[float, float]] = {}
        for row in sorted((row for row in rows if row["kind"] == kind), key=lambda row: -row["val_loss"]):
            best[row["recipe"]] = (row["parameters_without_embedding"], row["val_loss"])
        points = sorted(best.values())
        color, label = COLORS[index % len(COLORS)], str(kind)
        if len(points) > 1:
            a, b = power_law(points)
            axes.plot([size / 1e6 for size, _ in points], [a * size**-b for size, _ in points], "--", color=color)
            label = f"{kind}: {a:.2f} N^-{b:.4f}"
        axes.plot([size / 1e6 for size, _ in points], [loss for _, loss in points], "o", color=color, label=label)
    _log_axis(axes)
    axes.set_xlabel("parameters without the embedding (millions)")


def _repeats(axes: Any, chart: Chart, repeats: Sequence[Row]) -> None:
    for index, group in enumerate(chart.groups):
        found = [row for row in repeats if _group(row) == group]
        points = [(row["repeat"], row["val_loss"]) for row in found if row["cell"] == found[0]["cell"]]
        _draw_line(axes, index, points, group)
    axes.set_xlabel("tokens since the same pair of tokens")


def _pairs(axes: Any, chart: Chart, rows: Sequence[Row]) -> None:
    for index, group in enumerate(chart.groups):
        cells = [row for row in rows if row["group"] == group and row.get("val_accuracy") is not None]
        best = max(cells, key=lambda row: row["val_accuracy"], default={})
        points = [
            (int(key.removeprefix(ACCURACY)), 100 * share)
            for key, share in best.items()
            if key.startswith(ACCURACY) and share is not None
        ]
        _draw_line(axes, index, sorted(points), group, markersize=6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(ylim=(-3, 103), xlabel="pairs in a row", ylabel="right answers, %")


def _log_axis(axes: Any) -> None:
    """A logarithmic x axis with plain numbers; between the powers of ten too where there is hardly one."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if high < 12 * low else "")


def _group(row: Row) -> str:
    """The group that a row of curves.csv belongs to."""
    return str(row["cell"]).partition("/")[0]


def _against(axes: Any, chart: Chart, rows: Sequence[Row]) -> None:
    key = chart.x.rpartition(".")[2]
    for index, group in enumerate(chart.groups):
        points = []
        for line in summarize([row for row in rows if row["group"] == group]):
            choices = dict(part.split("=", 1) for part in line.choice.split(",") if "=" in part)
            if key in choices:
                points.append((float(choices[key]), line.loss))
        if len(points) > 1:
            _draw_line(axes, index, sorted(points), group, markersize=6)
    _log_axis(axes)
    axes.set_xlabel(key.replace("_", " "))
