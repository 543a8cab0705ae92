"""Charts of a sweep, as its file's `charts` name them.

    picture = draw(chart, plan, rows, curves)      # bytes of a .png

`x: tokens` and `x: time` draw the validation loss along the best cell of each group; time is tokens over the speed of a
cell of the same recipe that ran alone. `x: cell` draws one dot a choice with its seeds; any other x is a key of the grid.
"""

import io
from collections.abc import Sequence
from typing import Any

from tnllm.errors import MissingExtra
from tnllm.sweep.plan import Chart, Row
from tnllm.sweep.table import summarize
from tnllm.training.plot import COLORS

_LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def draw(chart: Chart, rows: Sequence[Row], curves: Sequence[Row]) -> bytes | None:
    """The chart as bytes of a PNG file; None where no cell of its groups is done. Needs the extra `plot`."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("plot", "matplotlib") from None
    done = [row for row in rows if row["group"] in chart.groups and row["status"] == "done"]
    if not done:
        return None
    with rc_context(_LOOK):
        height = max(2.0, 0.26 * len(summarize(done)) + 1.0) if chart.x == "cell" else 4.2
        figure = Figure(figsize=(6.5, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(chart.title, loc="left")
        if chart.x == "cell":
            _dots(axes, done)
        elif chart.x in ("tokens", "time"):
            _lines(axes, chart, done, curves, alone_speeds(rows) if chart.x == "time" else None)
        else:
            _against(axes, chart, done)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def alone_speeds(rows: Sequence[Row]) -> dict[str, float]:
    """Tokens/s of each recipe, from cells that ran with nothing beside them."""
    return {
        row["recipe"]: row["tokens_per_s"] for row in rows if str(row["alone"]) == "True" and row["status"] == "done"
    }


def _dots(axes: Any, rows: Sequence[Row]) -> None:
    lines = summarize(rows)
    labels = [f"{line.group}: {line.choice}" if line.choice else line.group for line in lines]
    for index, line in enumerate(lines):
        color = COLORS[index % 2]
        axes.plot(line.losses, [index] * len(line.losses), "o", color=color, markersize=4, alpha=0.5)
        axes.plot([line.loss], [index], "|", color=color, markersize=12)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats per token)")


def _lines(
    axes: Any, chart: Chart, rows: Sequence[Row], curves: Sequence[Row], speeds: dict[str, float] | None
) -> None:
    for index, group in enumerate(chart.groups):
        cells = [row for row in rows if row["group"] == group]
        if not cells:
            continue
        best = min(cells, key=lambda row: row["val_loss"])
        if speeds is not None and best["recipe"] not in speeds:
            continue
        scale = 1e6 if speeds is None else speeds[best["recipe"]]
        points = [(row["tokens"] / scale, row["val_loss"]) for row in curves if row["cell"] == best["cell"]]
        axes.plot(*zip(*points, strict=True), "-o", color=COLORS[index % len(COLORS)], markersize=3, label=group)
    axes.set_xscale("log")
    axes.set_xlabel("tokens (millions)" if speeds is None else "time on one GPU, the cell alone (s)")
    axes.set_ylabel("validation loss (nats per token)")


def _against(axes: Any, chart: Chart, rows: Sequence[Row]) -> None:
    key = chart.x.rpartition(".")[2]
    for index, group in enumerate(chart.groups):
        points = []
        for line in summarize([row for row in rows if row["group"] == group]):
            choices = dict(part.split("=", 1) for part in line.choice.split(",") if "=" in part)
            if key in choices:
                points.append((float(choices[key]), line.loss))
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "-o", color=COLORS[index % len(COLORS)], label=group)
    axes.set_xscale("log")
    axes.set_xlabel(key.replace("_", " "))
    axes.set_ylabel("validation loss (nats per token)")
