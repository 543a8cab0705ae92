"""Benchmark results as a table, JSON, CSV and a chart."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from tnllm.errors import MissingExtra
from tnllm.files import write_text_atomic

# Wong's palette: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"


def print_results(results: dict[str, Any]) -> None:
    """Tables on stdout: device, accuracy, times."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    environment = dict(results["environment"])
    bandwidth = environment.pop("copy_tb_per_s")
    console.print(
        f"{environment.pop('device')}, copy {bandwidth:.3g} TB/s; "
        + ", ".join(f"{key} {value}" for key, value in environment.items()),
        highlight=False,
    )
    table = Table(title="relative RMS error against float64", title_justify="left")
    for column in ("provider", "o", "dq", "dk", "dv", "limit", ""):
        table.add_column(column, justify="left" if column in ("provider", "") else "right")
    for row in results["accuracy"]:
        errors = [f"{row[key]:.2e}" for key in ("o", "dq", "dk", "dv")]
        table.add_row(row["provider"], *errors, f"{row['limit']:g}", "ok" if row["passed"] else "WRONG")
    console.print(table)
    table = Table(title="time (median; 20th to 80th percentile) and memory", title_justify="left")
    columns = "B x H x T x D|provider|fwd ms|x floor|TB/s|TFLOP/s|fwd+bwd ms|x floor|extra MiB"
    for column in columns.split("|"):
        table.add_column(column, justify="left" if column == "provider" else "right", no_wrap=True)
    shape = None
    for row in results["rows"]:
        if shape not in (None, _shape(row)):
            table.add_section()
        shape = _shape(row)
        table.add_row(
            shape,
            row["provider"],
            _spread(row, "fwd"),
            f"{row['fwd_over_floor']:.3g}",
            f"{row['fwd_tb_per_s']:.2g}",
            f"{row['fwd_tflop_per_s']:.3g}",
            _spread(row, "fwd_bwd"),
            f"{row['fwd_bwd_over_floor']:.3g}",
            "-" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}",
        )
    console.print(table)


def print_errors(environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Errors against float64 by length, slope and provider, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    console.print(", ".join(f"{key} {value}" for key, value in environment.items()), highlight=False)
    table = Table(title="relative RMS error against float64", title_justify="left")
    for column in ("length", "slope", "provider", "o", "dq", "dk", "dv", "state"):
        table.add_column(column, justify="left" if column == "provider" else "right")
    for row in rows:
        errors = [f"{row[key]:.2e}" if key in row else "-" for key in ("o", "dq", "dk", "dv", "state")]
        table.add_row(length_label(row["length"]), f"{row['slope']:g}", row["provider"], *errors)
    console.print(table)


def _shape(row: dict[str, Any]) -> str:
    return f"{row['batch']} x {row['heads']} x {row['length']} x {row['head_dim']}"


def _spread(row: dict[str, Any], key: str) -> str:
    median, low, high = row[f"{key}_ms"], row[f"{key}_low_ms"], row[f"{key}_high_ms"]
    digits = max(0, 3 - len(str(int(median)))) + (1 if median < 1 else 0)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def write_json(results: dict[str, Any], path: Path) -> None:
    """Everything, as it was measured."""
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


def plot_attention(results: dict[str, Any], path: Path) -> None:
    """Time and memory against length, log axes, as PNG, SVG or PDF by the file's ending."""
    plt = pyplot()
    rows = results["rows"]
    panels = [("fwd_ms", "forward (ms)"), ("fwd_bwd_ms", "forward + backward (ms)")]
    if any(row["extra_mib"] is not None for row in rows):
        panels.append(("extra_mib", "extra memory, forward + backward (MiB)"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained")
    names = list(dict.fromkeys(row["provider"] for row in rows))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for index, name in enumerate(names):
            points = [(row["length"], row[key]) for row in rows if row["provider"] == name and row[key]]
            style = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7], "markersize": 4.5}
            axis.plot(*zip(*points, strict=True), label=name, linewidth=2.4 if name == "tnllm" else 1.4, **style)
        if key != "extra_mib":
            floor = "floor_" + key
            points = sorted({(row["length"], row[floor]) for row in rows})
            axis.plot(*zip(*points, strict=True), color="0.5", linestyle=":", label="memory floor")
        lengths = sorted({row["length"] for row in rows})
        axis.set(xscale="log", yscale="log", xlabel="sequence length (tokens)", ylabel=label)
        axis.set_xticks(lengths, [length_label(n) for n in lengths], rotation=45 if len(lengths) > 8 else 0)
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8.5)
    environment = results["environment"]
    spans = {key: sorted({row[key] for row in rows}) for key in ("batch", "heads", "head_dim")}
    batch, heads, dim = (str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans.values())
    figure.suptitle(
        f"{environment['device']}: batch {batch}, {heads} heads of {dim}, {environment['dtype']}", fontsize=10
    )
    figure.savefig(path, dpi=160)
    plt.close(figure)


_TRAIN_COLUMNS = (
    ("preset", 7),
    ("kind", 11),
    ("T", 7),
    ("batch", 5),
    ("tokens/s", 10),
    ("MFU", 6),
    ("ms/step (20-80 %)", 26),
    ("peak GiB", 8),
    ("first step s", 12),
    ("loss", 14),
)


def print_training_head(results: dict[str, Any]) -> None:
    """Device, gate and column names, on stdout, before the first row."""
    environment = dict(results["environment"])
    rate = environment.pop("matmul_tflop_per_s")
    measured = "" if rate is None else f", bf16 matrix product {rate:.0f} TFLOP/s"
    print(
        f"{environment.pop('device')}{measured}; " + ", ".join(f"{key} {_plain(v)}" for key, v in environment.items())
    )
    for row in results["accuracy"]:
        print(
            f"check against fp32 on the CPU, {row['preset']} {row['kind']}"
            f"{_recomputing(row['activation_checkpointing'])}: loss {row['loss']:.1e} (limit "
            f"{row['loss_limit']:g}), gradients {row['gradient']:.1e} (limit {row['gradient_limit']:g}): "
            f"{'ok' if row['passed'] else 'WRONG'}"
        )
    print("  ".join(_pad(name, name, width) for name, width in _TRAIN_COLUMNS), flush=True)


def print_training_row(row: dict[str, Any]) -> None:
    """One line, as soon as it is measured."""
    cells = [row["preset"], row["kind"], length_label(row["seq_len"]), str(row["rows"])]
    if row["step_ms"] is None:
        print("  ".join([*(_pad(n, c, w) for (n, w), c in zip(_TRAIN_COLUMNS, cells, strict=False)), row["status"]]))
    else:
        cells += [
            f"{row['tokens_per_s']:,.0f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['step_ms']:.1f} ({row['low_ms']:.1f}-{row['high_ms']:.1f})",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
            f"{row['compile_s']:.1f}",
            f"{row['first_loss']:.2f} > {row['last_loss']:.2f}",
        ]
        more = [] if row["status"] == "ok" else [row["status"]]
        more += [_recomputing(row["activation_checkpointing"]).strip()] * (row["activation_checkpointing"] != "none")
        print("  ".join([*(_pad(n, c, w) for (n, w), c in zip(_TRAIN_COLUMNS, cells, strict=True)), *more]))
    sys.stdout.flush()


def _recomputing(mode: str) -> str:
    return "" if mode == "none" else f" with {mode} recomputation"


def _pad(name: str, text: str, width: int) -> str:
    return text.ljust(width) if name in ("preset", "kind") else text.rjust(width)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compare_training(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences: how much faster than the baseline at each length, and how flat over lengths."""
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
        for kind, found in (("transnormer", ours), ("transformer", theirs)):
            speeds = [row["tokens_per_s"] for row in found.values()]
            if len(speeds) > 1:
                lines.append(
                    f"{name}: {kind}'s slowest length has {min(speeds) / max(speeds):.0%} of its fastest's speed"
                )
    return lines


def plot_training(results: dict[str, Any], path: Path) -> None:
    """Tokens/s, utilisation and memory against length, as PNG, SVG or PDF by the file's ending."""
    plt = pyplot()
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    panels = [("tokens_per_s", "training speed (tokens/s)")]
    for key, label in (("mfu", "FLOP utilisation"), ("peak_gib", "peak memory (GiB)")):
        if any(row[key] is not None for row in rows):
            panels.append((key, label))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained", squeeze=False)
    series = list(dict.fromkeys((row["preset"], row["kind"], row["activation_checkpointing"]) for row in rows))
    lengths = sorted({row["seq_len"] for row in rows})
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for index, (preset, kind, mode) in enumerate(series):
            points = [
                (row["seq_len"], row[key])
                for row in rows
                if (row["preset"], row["kind"], row["activation_checkpointing"]) == (preset, kind, mode)
            ]
            name = f"{preset} {kind}{_recomputing(mode)}"
            axis.plot(
                *zip(*points, strict=True), label=name, color=COLOURS[index % 7], marker=MARKERS[index % 7], markersize=4.5,
                linewidth=2.2 if kind == "transnormer" else 1.4,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="sequence length (tokens)", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.set_xticks(lengths, [length_label(n) for n in lengths], rotation=45 if len(lengths) > 8 else 0)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _, key=key: f"{value:.0%}" if key == "mfu" else f"{value:,.0f}")
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if rows:
        axes[0][0].legend(frameon=False, fontsize=8.5)
    environment = results["environment"]
    figure.suptitle(f"{environment['device']}: whole training steps, {environment['dtype']}", fontsize=10)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def length_label(tokens: int) -> str:
    """`64K`, `1M`: tokens in powers of two where they are."""
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else str(tokens)
