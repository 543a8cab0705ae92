"""Benchmark results as tables, JSON, CSV and charts."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tnllm.errors import MissingExtra
from tnllm.files import write_text_atomic

# Wong's palette: distinguishable with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[str] = ("provider", ""),
    groups: Sequence[object] = (),
) -> None:
    """Print a table on stdout; columns are right-aligned but for `left`. `groups`: per row; a line between unlike ones."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for index, row in enumerate(rows):
        if groups and index and groups[index] != groups[index - 1]:
            table.add_section()
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 140).print(table)


def print_results(results: dict[str, Any]) -> None:
    """Tables on stdout: device, accuracy, times."""
    print(environment_line(results["environment"]))
    rows = [
        [row["provider"], *(f"{row[key]:.2e}" for key in ("o", "dq", "dk", "dv")), f"{row['limit']:g}", verdict(row)]
        for row in results["accuracy"]
    ]
    print_table("relative RMS error against float64", ("provider", "o", "dq", "dk", "dv", "limit", ""), rows)
    columns = "B x H x T x D|provider|fwd ms|x floor|TB/s|TFLOP/s|fwd+bwd ms|x floor|extra MiB"
    rows = [
        [
            f"{row['batch']} x {row['heads']} x {row['length']} x {row['head_dim']}", row["provider"],
            _spread(row, "fwd"), f"{row['fwd_over_floor']:.3g}", f"{row['fwd_tb_per_s']:.2g}",
            f"{row['fwd_tflop_per_s']:.3g}", _spread(row, "fwd_bwd"), f"{row['fwd_bwd_over_floor']:.3g}",
            or_dash(row["extra_mib"], ".0f"),
        ]
        for row in results["rows"]
    ]  # fmt: skip
    title = "time (median; 20th to 80th percentile) and memory"
    print_table(title, columns.split("|"), rows, groups=[row[0] for row in rows])


def print_errors(environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Errors against float64 by length, slope and provider, on stdout."""
    print(environment_line(environment))
    columns = ("length", "slope", "provider", "o", "dq", "dk", "dv", "state")
    cells = [
        [
            length_label(row["length"]), f"{row['slope']:g}", row["provider"],
            *(or_dash(row.get(key), ".2e") for key in columns[3:]),
        ]
        for row in rows
    ]  # fmt: skip
    print_table("relative RMS error against float64", columns, cells)


def environment_line(environment: dict[str, Any]) -> str:
    """The device with its measured rates, then versions and settings."""
    rest = dict(environment)
    device = rest.pop("device")
    if (bandwidth := rest.pop("copy_tb_per_s", None)) is not None:
        device += f", copy {bandwidth:.3g} TB/s"
    if (rate := rest.pop("matmul_tflop_per_s", None)) is not None:
        device += f", bf16 matrix product {rate:.0f} TFLOP/s"
    values = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items())
    return f"{device}; {', '.join(values)}"


def or_dash(value: float | None, form: str) -> str:
    """`value` in the format `form`; `-` for None, what could not be measured."""
    return "-" if value is None else format(value, form)


def verdict(row: dict[str, Any]) -> str:
    """Of a row of accuracy."""
    return "ok" if row["passed"] else "WRONG"


def _spread(row: dict[str, Any], key: str) -> str:
    median, low, high = row[f"{key}_ms"], row[f"{key}_low_ms"], row[f"{key}_high_ms"]
    digits = max(0, 3 - len(str(int(median)))) + (1 if median < 1 else 0)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def write_json(results: dict[str, Any], path: Path) -> None:
    """All results, as measured."""
    write_text_atomic(path, json.dumps(results, indent=2) + "\n")


def write_csv(results: dict[str, Any], path: Path) -> None:
    """The rows, with the device beside each."""
    text = io.StringIO()
    rows = [
        {"device": results["environment"]["device"], "dtype": results["environment"]["dtype"], **row}
        for row in results["rows"]
    ]
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. Raises MissingExtra."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("plot", "matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def style_axis(axis: Any, ticks: Sequence[int], labels: Sequence[str], legend: bool = False) -> None:
    """The look of every chart: few lines, and ticks at the measured values."""
    axis.set_xticks(ticks, labels, rotation=45 if len(ticks) > 8 else 0)
    axis.minorticks_off()
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize=8.5)


def draw_line(
    axis: Any, points: Iterable[tuple[float, float]], index: int, label: str, width: float, **style: Any
) -> None:
    """A line through (x, y) points in the colour and marker of series `index`."""
    look = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7], "markersize": 4.5, "linewidth": width, **style}
    axis.plot(*zip(*points, strict=True), label=label, **look)


def save_figure(figure: Any, title: str, path: Path) -> None:
    """Write a chart as PNG, SVG or PDF, by the suffix of `path`."""
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)
    pyplot().close(figure)


def plot_attention(results: dict[str, Any], path: Path) -> None:
    """Time and memory against length, log axes."""
    rows = results["rows"]
    panels = [("fwd_ms", "forward (ms)"), ("fwd_bwd_ms", "forward + backward (ms)")]
    if any(row["extra_mib"] is not None for row in rows):
        panels.append(("extra_mib", "extra memory, forward + backward (MiB)"))
    figure, axes = pyplot().subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained")
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    for axis, (key, label) in zip(axes, panels, strict=True):
        for index, name in enumerate(names):
            points = [(row["length"], row[key]) for row in rows if row["provider"] == name and row[key]]
            draw_line(axis, points, index, name, 2.4 if name == "tnllm" else 1.4)
        if key != "extra_mib":
            points = sorted({(row["length"], row["floor_" + key]) for row in rows})
            axis.plot(*zip(*points, strict=True), color="0.5", linestyle=":", label="memory floor")
        axis.set(xscale="log", yscale="log", xlabel="sequence length (tokens)", ylabel=label)
        style_axis(axis, lengths, [length_label(n) for n in lengths], legend=axis is axes[0])
    environment = results["environment"]
    spans = {key: sorted({row[key] for row in rows}) for key in ("batch", "heads", "head_dim")}
    batch, heads, dim = (str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans.values())
    title = f"{environment['device']}: batch {batch}, {heads} heads of {dim}, {environment['dtype']}"
    save_figure(figure, title, path)


_TRAIN_COLUMNS = (
    ("preset", 7), ("kind", 11), ("T", 7), ("batch", 5), ("tokens/s", 10), ("MFU", 6), ("ms/step (20-80 %)", 26),
    ("peak GiB", 8), ("first step s", 12), ("loss", 14),
)  # fmt: skip
_TRAIN_LEFT = ("preset", "kind")


def print_training_head(results: dict[str, Any]) -> None:
    """Device, checks and column names, on stdout, before the first row."""
    print(environment_line(results["environment"]))
    for row in results["accuracy"]:
        print(
            f"check against fp32 on the CPU, {row['preset']} {row['kind']}"
            f"{_recomputing(row['activation_checkpointing'])}: loss {row['loss']:.1e} (limit "
            f"{row['loss_limit']:g}), gradients {row['gradient']:.1e} (limit {row['gradient_limit']:g}): {verdict(row)}"
        )
    print_cells(_TRAIN_COLUMNS, [name for name, _ in _TRAIN_COLUMNS], _TRAIN_LEFT)


def print_training_row(row: dict[str, Any]) -> None:
    """One line, as soon as it is measured."""
    cells = [row["preset"], row["kind"], length_label(row["seq_len"]), str(row["rows"])]
    if row["step_ms"] is None:
        print_cells(_TRAIN_COLUMNS, cells, _TRAIN_LEFT, [row["status"]])
        return
    cells += [
        f"{row['tokens_per_s']:,.0f}",
        or_dash(row["mfu"], ".1%"),
        step_spread(row),
        or_dash(row["peak_gib"], ".2f"),
        f"{row['compile_s']:.1f}",
        f"{row['first_loss']:.2f} > {row['last_loss']:.2f}",
    ]
    more = [] if row["status"] == "ok" else [row["status"]]
    more += [_recomputing(row["activation_checkpointing"]).strip()] * (row["activation_checkpointing"] != "none")
    print_cells(_TRAIN_COLUMNS, cells, _TRAIN_LEFT, more)


def print_cells(
    columns: Sequence[tuple[str, int]], cells: Sequence[str], left: Sequence[str], more: Sequence[str] = ()
) -> None:
    """Print a row of fixed-width columns (name, width), then `more` as it is; there may be fewer cells than columns."""
    padded = [
        cell.ljust(width) if name in left else cell.rjust(width)
        for (name, width), cell in zip(columns, cells, strict=False)
    ]
    print("  ".join([*padded, *more]).rstrip(), flush=True)


def step_spread(row: dict[str, Any]) -> str:
    """Milliseconds of a step: median (20th to 80th percentile)."""
    return f"{row['step_ms']:.1f} ({row['low_ms']:.1f}-{row['high_ms']:.1f})"


def _recomputing(mode: str) -> str:
    return "" if mode == "none" else f" with {mode} recomputation"


def compare_training(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences: speed over the baseline's at each length, and how constant it is over lengths."""
    done = [row for row in rows if row["status"] == "ok"]
    key = ("preset", "activation_checkpointing")
    lines = []
    for group in dict.fromkeys(tuple(row[name] for name in key) for row in done):
        mine = [row for row in done if tuple(row[name] for name in key) == group]
        ours, theirs = (
            {row["seq_len"]: row for row in mine if row["kind"] == kind} for kind in ("transnormer", "transformer")
        )
        name = group[0] + _recomputing(group[1])
        ratios = [
            f"{ours[length]['tokens_per_s'] / theirs[length]['tokens_per_s']:.2f} at {length_label(length)}"
            for length in ours
            if length in theirs
        ]
        if ratios:
            lines.append(f"{name}: transnormer over transformer, tokens/s: {', '.join(ratios)}")
        for kind, by_length in (("transnormer", ours), ("transformer", theirs)):
            speeds = [row["tokens_per_s"] for row in by_length.values()]
            if len(speeds) > 1:
                lines.append(
                    f"{name}: {kind}'s slowest length has {min(speeds) / max(speeds):.0%} of its fastest's speed"
                )
    return lines


def plot_training(results: dict[str, Any], path: Path) -> None:
    """Tokens/s, utilisation and memory against length."""
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    panels = [("tokens_per_s", "training speed (tokens/s)")]
    for key, label in (("mfu", "FLOP utilisation"), ("peak_gib", "peak memory (GiB)")):
        if any(row[key] is not None for row in rows):
            panels.append((key, label))
    size = (4.6 * len(panels), 4.2)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    names = ("preset", "kind", "activation_checkpointing")
    series = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    lengths = sorted({row["seq_len"] for row in rows})
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for index, group in enumerate(series):
            preset, kind, mode = group
            points = [(row["seq_len"], row[key]) for row in rows if tuple(row[name] for name in names) == group]
            draw_line(
                axis, points, index, f"{preset} {kind}{_recomputing(mode)}", 2.2 if kind == "transnormer" else 1.4
            )
        axis.set(xscale="log", xlabel="sequence length (tokens)", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda value, _, key=key: f"{value:.0%}" if key == "mfu" else f"{value:,.0f}")
        style_axis(axis, lengths, [length_label(n) for n in lengths], legend=bool(rows) and axis is axes[0][0])
    environment = results["environment"]
    save_figure(figure, f"{environment['device']}: full training steps, {environment['dtype']}", path)


def length_label(tokens: int) -> str:
    """`64K`, `1M`: multiples of 1024 by their unit, other numbers as they are."""
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else str(tokens)
