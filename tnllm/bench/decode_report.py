"""The results of `bench_decode` as tables and as a chart."""

from pathlib import Path
from typing import Any

from tnllm.bench import report
from tnllm.bench.report import length_label, or_dash


def print_decode(results: dict[str, Any]) -> None:
    """Tables on stdout: device, accuracy, batch 1 by position, every batch."""
    print(report.environment_line(results["environment"]))
    errors = ("forward_error", "step_error", "limit")
    rows = [
        [row["provider"], *(f"{row[key]:.2e}" for key in errors), report.verdict(row)] for row in results["accuracy"]
    ]
    columns = ("provider", "full forward", "step", "limit", "")
    report.print_table("logits against a wider dtype, relative RMS error", columns, rows)
    rows = [
        [
            row["preset"], row["provider"], str(row["batch"]), length_label(row["position"]),
            f"{row['step_ms']:.4g} ({row['low_ms']:.4g}-{row['high_ms']:.4g})", f"{row['tokens_per_s']:.4g}",
            f"{row['bandwidth_share']:.0%}", f"{row['weight_gib']:.3g}", f"{row['state_gib']:.3g}",
            or_dash(row["peak_gib"], ".3g"),
        ]
        for row in results["rows"]
    ]  # fmt: skip
    names = "preset|provider|batch|position|step ms|tokens/s|of the limit|weights GiB|state GiB|peak GiB"
    title = "a decoding step (median; 20th to 80th percentile)"
    groups = [
        (row["provider"], row["sweep"], row["position"] if row["sweep"] == "batch" else 0) for row in results["rows"]
    ]
    report.print_table(title, names.split("|"), rows, ("preset", "provider"), groups)
    flat = [row["step_ms"] for row in results["rows"] if row["sweep"] == "position"]
    if len(flat) > 1:
        spread = max(flat) / min(flat) - 1
        print(f"tnllm, batch 1: slowest position {spread:.1%} above the fastest")
    for row in results["skipped"]:
        where = f"{row['provider']}, batch {row['batch']}, position {length_label(row['position'])}"
        print(f"skipped: {where} ({row['reason']})")


def plot_decode(results: dict[str, Any], path: Path) -> None:
    """Latency by position, tokens per second by batch and memory by batch."""
    rows = results["rows"]
    figure, axes = report.pyplot().subplots(1, 3, figsize=(14, 4.2), layout="constrained")
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
                report.draw_line(axis, points, index, name, 2.4 if index == 0 else 1.4)
        ticks = sorted({x for _, points in series for x, _ in points})
        values = [y for _, points in series for _, y in points]
        # Latency from zero, so that constant looks constant; a logarithmic axis of less than a decade has no numbers.
        linear = axis is axes[0] or max(values, default=1.0) < 10 * min(values, default=1.0)
        axis.set(xscale="log", yscale="linear" if linear else "log", xlabel=xlabel, ylabel=ylabel)
        if linear:
            axis.set_ylim(bottom=0)
        report.style_axis(axis, ticks, [length_label(x) for x in ticks], legend=True)
    environment = results["environment"]
    preset = rows[0]["preset"] if rows else ""
    report.save_figure(figure, f"decoding {preset}, {environment['device']}, {environment['dtype']}", path)
