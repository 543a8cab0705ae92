"""A chart of one or several runs from their metrics.jsonl: loss, learning rate, speed.

runs = [read_run(Path("runs/tiny")), read_run(Path("runs/tiny-transformer"))]
write_bytes_atomic(path, draw(runs, x="tokens", suffix=".png"))
"""

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tnllm.errors import UserError, optional_import
from tnllm.files import format_count
from tnllm.progress import log
from tnllm.training.metrics import read_metrics

Axis = Literal["step", "tokens", "time"]
FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, told apart by colour-blind readers; black is kept for text.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", ":", "-.")
# matplotlib's settings for every chart.
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "tnllm",
}


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of that size in inches, in the style of every chart. Raises MissingExtra without matplotlib."""
    with optional_import("plot", "matplotlib"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    with rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def picture(figure: Any, suffix: str = ".png", dpi: int = 160) -> bytes:
    """The figure as bytes of a .png, .pdf or .svg file; without a date in it, the same figure gives the same bytes."""
    buffer = io.BytesIO()
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(buffer, format=suffix[1:], dpi=dpi, metadata=dates.get(suffix))
    return buffer.getvalue()


@dataclass(frozen=True)
class Run:
    """Rows of one metrics.jsonl: those of training and those of validation."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    @property
    def start(self) -> float:
        """Unix seconds of the first row."""
        return min(row["time"] for row in [*self.train[:1], *self.validation[:1]])


def read_run(path: Path) -> Run:
    """Read a run folder, or a metrics file. Damaged lines are left out, with a line on stderr.

    Raises UserError if there is no such file or no row yet.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no metrics at {file}; give a run folder (runs/NAME) or its metrics.jsonl")
    rows = [row for row in read_metrics(file) if {"tokens", "time"} <= row.keys()]
    damaged = len(file.read_bytes().splitlines()) - len(rows)
    if rows and damaged:
        log(f"{file}: {damaged} damaged lines are left out")
    run = Run(
        name=path.name if path.is_dir() else path.parent.name or path.name,
        train=[row for row in rows if row.get("loss") is not None],
        validation=[row for row in rows if row.get("val_loss") is not None],
    )
    if not run.train and not run.validation:
        how = "wait for the first log.every_steps of the run, or give another run's folder or metrics.jsonl"
        raise UserError(f"{file} holds no logged step; {how}")
    return run


def smooth(values: list[float], span: int) -> list[float]:
    """Exponential moving average with a time constant of `span` points (0: none), corrected for its bias at the start.

    Values that are not finite are skipped.
    """
    keep = math.exp(-1 / span) if span else 0.0
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else math.nan)
    return result


def draw(runs: list[Run], x: Axis = "step", suffix: str = ".png", span: int | None = None) -> bytes:
    """The chart as bytes of a .png, .pdf or .svg file.

    `span`: time constant of the smoothed training loss in logged rows (0: none; None: a third of the square root of the
    longest run's rows). Raises MissingExtra without matplotlib.
    """
    assert suffix in FORMATS, suffix
    if span is None:
        span = round(math.sqrt(max(len(run.train) for run in runs)) / 3)
    scale, label = _axis(runs, x)
    with new_figure(6.5, 6.2) as figure:
        loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=[2.6, 1, 1])
        for index, run in enumerate(runs):
            color, style = COLORS[index % len(COLORS)], _STYLES[index // len(COLORS) % len(_STYLES)]
            _draw_run(run, x, scale, span, [loss, rate, speed], color, style, several=len(runs) > 1)
        loss.set_ylabel("loss (nats per token)")
        loss.legend()
        rate.set(ylabel="learning rate", ylim=(0, None))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        speed.set(ylabel="speed (tokens/s)", ylim=(0, None), xlabel=label)
        speed.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        speed.yaxis.set_major_formatter(lambda value, _: format_count(value))
        figure.align_ylabels()
        return picture(figure, suffix, dpi=200)


def _draw_run(
    run: Run, x: Axis, scale: float, span: int, panels: list[Any], color: str, style: str, several: bool
) -> None:
    loss, rate, speed = panels
    steps = [_position(run, row, x) / scale for row in run.train]
    raw = [float(row["loss"]) for row in run.train]
    prefix = f"{run.name}, " if several else ""
    if run.train:
        loss.plot(steps, raw, color=color, alpha=0.25, linewidth=0.8)
        loss.plot(steps, smooth(raw, span), color=color, linestyle=style, linewidth=1.6, label=f"{prefix}training")
    if run.validation:
        at = [_position(run, row, x) / scale for row in run.validation]
        values = [float(row["val_loss"]) for row in run.validation]
        loss.plot(
            at, values, color=color, marker="o", markersize=4, markerfacecolor="white", linewidth=0.8,
            linestyle=":", label=f"{prefix}validation",
        )  # fmt: skip
    for panel, key in ((rate, "lr"), (speed, "tokens_per_s")):
        points = [(at, row[key]) for at, row in zip(steps, run.train, strict=True) if row.get(key) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.2)


def _position(run: Run, row: dict[str, Any], x: Axis) -> float:
    return row["time"] - run.start if x == "time" else row[x]


def _axis(runs: list[Run], x: Axis) -> tuple[float, str]:
    """Unit of the x axis, and its label."""
    far = max(_position(run, row, x) for run in runs for row in [*run.train[-1:], *run.validation[-1:]])
    if x == "step":
        return 1.0, "step"
    if x == "tokens":
        for size, word in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
            if far >= size:
                return size, f"tokens ({word})"
        return 1.0, "tokens"
    for size, word in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if far >= 2 * size:
            return size, f"time since the first row ({word})"
    return 1.0, "time since the first row (s)"
