"""Results of `bench_scaling` as lines while they come, sentences, and a chart; `report` writes JSON and CSV."""

from pathlib import Path
from typing import Any

from tnllm.bench import report
from tnllm.bench.report import length_label, or_dash
from tnllm.bench.scale import ONE
from tnllm.files import format_bytes
from tnllm.parallel.traffic import TRAFFIC_AXES

_COLUMNS = (
    ("preset", 6), ("GPUs", 4), ("mesh", 8), ("scaling", 22), ("rows x T", 9), ("tokens/s", 9), ("per GPU / one", 13),
    ("MFU", 6), ("ms/step (20-80 %)", 24), ("peak GiB", 8), ("comm ms (exposed)", 17), ("sent a step", 11),
)  # fmt: skip


def print_environment(results: dict[str, Any]) -> None:
    """Device, versions and column names, on stdout, before the first row."""
    print(report.environment_line(results["environment"]))
    _print([name for name, _ in _COLUMNS])


def _print(cells: list[str]) -> None:
    report.print_cells(_COLUMNS, cells, ("preset", "mesh", "scaling"))


def print_check(row: dict[str, Any]) -> None:
    """One line about a mesh's check."""
    name = f"check of ten steps against one GPU, {row['preset']} {row['mesh']} on {row['gpus']}"
    if row["status"] != "ok":
        print(f"{name}: {row['status']}: {row.get('reason', '')}", flush=True)
        return
    print(
        f"{name}: loss {row['loss_difference']:.1e} (limit {row['loss_limit']:g}), gradient norm "
        f"{row['norm_difference']:.1e} (limit {row['norm_limit']:g}): {report.verdict(row)}",
        flush=True,
    )


def print_row(row: dict[str, Any]) -> None:
    """One line for a timed case, or for the longest row."""
    if "longest" in row or "tried" in row or "step_ms" not in row:
        print(longest_line(row), flush=True)
        return
    cells = [
        row["preset"],
        str(row["gpus"]),
        mesh_name(row["mesh"], row["gpus"]),
        row["scaling"],
        f"{row['rows']} x {length_label(row['seq_len'])}",
    ]
    if row["status"] != "ok":
        _print([*cells, f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]])
        return
    share = f"{row['efficiency']:.0%}" + ("" if row["base_gpus"] == 1 else f" of {row['base_gpus']}")
    sent = sum(row[f"sent_{axis}"] or 0 for axis in TRAFFIC_AXES)
    comm = or_dash(row["comm_ms"], ".1f")
    comm += "" if row["comm_exposed_ms"] is None else f" ({row['comm_exposed_ms']:.1f})"
    _print(
        [
            *cells,
            f"{row['tokens_per_s']:,.0f}",
            share,
            or_dash(row["mfu"], ".1%"),
            report.step_spread(row),
            or_dash(row["peak_gib"], ".2f"),
            comm,
            "-" if row["mesh"] == ONE else format_bytes(sent),
        ]
    )


def longest_line(row: dict[str, Any]) -> str:
    """The longest row of a mesh in words."""
    name = f"{row['preset']}, {mesh_name(row['mesh'], row['gpus'])} on {row['gpus']}"
    fits = row.get("longest")
    if fits is None:
        return f"longest row, {name}: not found ({row['status']}: {row.get('reason', '')})"
    if row["status"] == "ok":
        return f"longest row, {name}: at least {length_label(fits)} tokens (the search ends there)"
    ended = "does not" if row["status"] == "out of memory" else f"{row['status']}: {row.get('reason', '')}"
    return f"longest row, {name}: {length_label(fits)} tokens fit, {length_label(row['tried'])}: {ended}"


def mesh_name(mesh: str, gpus: int) -> str:
    """`-` for one GPU."""
    return "-" if mesh == ONE else mesh


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences: bytes sent along each axis, counted and computed, and whether long rows cost more per token."""
    lines = []
    done = [row for row in rows if row["status"] == "ok" and row["mesh"] != ONE]
    for row in done:
        name = f"{row['preset']} {row['mesh']} on {row['gpus']}"
        parts = []
        for axis in TRAFFIC_AXES:
            sent, ms = row[f"sent_{axis}"], row[f"ms_{axis}"]
            if sent and axis != "other":
                parts.append(f"{axis} {format_bytes(sent)}" + ("" if ms is None else f", {ms:.1f} ms"))
        if parts:
            computed = format_bytes(row["computed_bytes"])
            lines.append(f"{name}: a rank sends a step, counted: {'; '.join(parts)} (computed: {computed})")
    for row in done:
        if row["sequence"] == row["gpus"] and row["base_gpus"] == 1:
            ratio = 1 / row["efficiency"]
            lines.append(
                f"{row['preset']} {row['mesh']}: a row {row['gpus']} times as long on {row['gpus']} ranks takes "
                f"{ratio:.2f} times one rank's time per token of a rank"
            )
    return lines


def plot_scaling(results: dict[str, Any], path: Path) -> None:
    """Throughput per GPU relative to one GPU's, length of a row and memory, against the number of GPUs."""
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    numbers = sorted({row["gpus"] for row in results["rows"]})
    long = any(row.get("longest") for row in results["longest"])
    panels = [
        "efficiency",
        *(["longest"] if long else []),
        *(["peak_gib"] if any(row["peak_gib"] for row in rows) else []),
    ]
    if len(panels) == 1:
        panels.append("per_gpu")
    labels = {
        "efficiency": "throughput per GPU, share of one GPU's",
        "longest": "longest row that fits (tokens)",
        "peak_gib": "peak memory of a GPU (GiB)",
        "per_gpu": "throughput per GPU (tokens/s)",
    }
    word = "GPUs" if results["environment"]["device"][:3] != "cpu" else "processes"
    figure, axes = report.pyplot().subplots(1, len(panels), figsize=(4.6 * len(panels), 4.0), layout="constrained")
    series = list(dict.fromkeys((row["preset"], row["mesh"]) for row in rows if row["mesh"] != ONE))
    for axis, key in zip(axes, panels, strict=True):
        source = results["longest"] if key == "longest" else rows
        for index, (preset, mesh) in enumerate(series):
            mine = [row for row in source if row["preset"] == preset and row["mesh"] == mesh]
            if key == "longest":
                mine += [row for row in source if row["preset"] == preset and row["mesh"] == ONE]
                mine = mine if any(row["mesh"] == mesh for row in mine) else []
            else:
                sequence = any(row["sequence"] > 1 for row in mine)
                alone = [row for row in rows if row["preset"] == preset and row["mesh"] == ONE]
                mine += [row for row in alone if (row["rows"] == 1) == sequence][:1] or alone[:1]
            points = sorted((row["gpus"], row[key]) for row in mine if row.get(key))
            if points:
                name = f"{preset} {mesh}" + (f", {_kind(rows, preset, mesh)}" if key == "efficiency" else "")
                report.draw_line(axis, points, index, name, 1.7, linestyle=("-", "--", ":")[index // 7 % 3])
        label = labels[key] if word == "GPUs" else labels[key].replace("GPU", "process")
        axis.set(xscale="log", xlabel=f"number of {word}", ylabel=label)
        axis.margins(x=0.08)
        if key == "efficiency":
            axis.axhline(1, color="0.5", linestyle=":", linewidth=1)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if key == "longest":
            axis.set_yscale("log", base=2)
            fitting = sorted({row["longest"] for row in source if row.get("longest")})
            axis.set_yticks(fitting, [length_label(value) for value in fitting])
        else:
            axis.set_ylim(0, 1.06 * axis.get_ylim()[1])
        if key == "per_gpu":
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        legend = bool(axis.get_legend_handles_labels()[0])
        report.style_axis(axis, numbers, [str(number) for number in numbers], legend)
    environment = results["environment"]
    report.save_figure(figure, f"{environment['device']}: full training steps, {environment['dtype']}", path)


def _kind(rows: list[dict[str, Any]], preset: str, mesh: str) -> str:
    return next(row["scaling"] for row in rows if (row["preset"], row["mesh"]) == (preset, mesh))
