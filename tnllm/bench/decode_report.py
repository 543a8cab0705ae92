"""The results of `bench_decode` as tables and as a chart."""

from pathlib import Path
from typing import Any

from tnllm.bench.report import COLOURS, MARKERS, length_label, pyplot


def print_decode(results: dict[str, Any]) -> None:
    """Tables on stdout: device, accuracy, batch 1 by position, every batch."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    environment = dict(results["environment"])
    bandwidth = environment.pop("copy_tb_per_s")
    head = ", ".join(f"{key} {value}" for key, value in environment.items() if key != "device")
    console.print(f"{environment['device']}, copy {bandwidth:.3g} TB/s; {head}", highlight=False)
    table = Table(title="logits against a wider dtype, relative RMS error", title_justify="left")
    for column in ("provider", "full forward", "step", "limit", ""):
        table.add_column(column, justify="left" if column in ("provider", "") else "right")
    for row in results["accuracy"]:
        errors = [f"{row[key]:.2e}" for key in ("forward_error", "step_error", "limit")]
        table.add_row(row["provider"], *errors, "ok" if row["passed"] else "WRONG")
    console.print(table)
    table = Table(title="a decoding step (median; 20th to 80th percentile)", title_justify="left")
    columns = "preset|provider|batch|position|step ms|tokens/s|of the limit|weights GiB|state GiB|peak GiB"
    for column in columns.split("|"):
        table.add_column(column, justify="left" if column in ("preset", "provider") else "right", no_wrap=True)
    before = None
    for row in results["rows"]:
        group = (row["provider"], row["sweep"], row["position"] if row["sweep"] == "batch" else 0)
        if before not in (None, group):
            table.add_section()
        before = group
        table.add_row(
            row["preset"],
            row["provider"],
            str(row["batch"]),
            length_label(row["position"]),
            f"{row['step_ms']:.4g} ({row['low_ms']:.4g}-{row['high_ms']:.4g})",
            f"{row['tokens_per_s']:.4g}",
            f"{row['bandwidth_share']:.0%}",
            f"{row['weight_gib']:.3g}",
            f"{row['state_gib']:.3g}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.3g}",
        )
    console.print(table)
    flat = [row["step_ms"] for row in results["rows"] if row["sweep"] == "position"]
    if len(flat) > 1:
        spread = max(flat) / min(flat) - 1
        console.print(f"tnllm, batch 1: slowest position {spread:.1%} above the fastest", highlight=False)
    for row in results["skipped"]:
        where = f"{row['provider']}, batch {row['batch']}, position {length_label(row['position'])}"
        console.print(f"skipped: {where} ({row['reason']})", highlight=False)


def plot_decode(results: dict[str, Any], path: Path) -> None:
    """Latency by position, tokens per second by batch and memory by batch, as PNG, SVG or PDF by the file's ending."""
    plt = pyplot()
    rows = results["rows"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    own = [row for row in rows if row["provider"] == "tnllm"]
    cached = [row for row in rows if row["provider"] == "transformer"]
    contexts = sorted({row["position"] for row in cached})
    by_position = [
        ("tnllm", [(row["position"], row["step_ms"]) for row in own if row["sweep"] == "position"]),
        ("Transformer", [(row["position"], row["step_ms"]) for row in cached if row["batch"] == 1]),
    ]

    def by_batch(key: str) -> list[tuple[str, list[tuple[int, float]]]]:
        series = [("tnllm, any position", [(row["batch"], row[key]) for row in own if row["sweep"] == "batch"])]
        for context in contexts:
            points = [(row["batch"], row[key]) for row in cached if row["position"] == context]
            series.append((f"Transformer, {length_label(context)}", points))
        return series

    panels = (
        (axes[0], by_position, "position (tokens read)", "ms per token, batch 1"),
        (axes[1], by_batch("tokens_per_s"), "batch", "tokens/s"),
        (axes[2], by_batch("state_gib"), "batch", "state or cache (GiB)"),
    )
    for axis, series, xlabel, ylabel in panels:
        for index, (name, points) in enumerate(series):
            if points:
                style = {"color": COLOURS[index], "marker": MARKERS[index], "markersize": 4.5}
                axis.plot(*zip(*points, strict=True), label=name, linewidth=2.4 if index == 0 else 1.4, **style)
        ticks = sorted({x for _, points in series for x, _ in points})
        values = [y for _, points in series for _, y in points]
        # Latency from zero, so that flat looks flat; and a logarithmic axis of less than a decade would have no numbers.
        linear = axis is axes[0] or max(values, default=1.0) < 10 * min(values, default=1.0)
        axis.set(xscale="log", yscale="linear" if linear else "log", xlabel=xlabel, ylabel=ylabel)
        if linear:
            axis.set_ylim(bottom=0)
        axis.set_xticks(ticks, [length_label(x) for x in ticks], rotation=45 if len(ticks) > 8 else 0)
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5)
    environment = results["environment"]
    preset = rows[0]["preset"] if rows else ""
    figure.suptitle(f"decoding {preset}, {environment['device']}, {environment['dtype']}", fontsize=10)
    figure.savefig(path, dpi=160)
    plt.close(figure)
