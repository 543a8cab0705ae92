"""Training on several devices, as people read it: rows on stdout, CSV, a chart."""

import csv
import io
import sys
from pathlib import Path
from typing import Any

from tnllm.bench.report import COLOURS, MARKERS, length_label
from tnllm.errors import MissingExtra
from tnllm.files import write_text_atomic

_COLUMNS = (
    ("preset", 7),
    ("mesh", 8),
    ("GPUs", 4),
    ("rows x T", 10),
    ("tokens/s", 10),
    ("per GPU", 9),
    ("efficiency", 10),
    ("MFU", 6),
    ("ms/step (20-80 %)", 26),
    ("peak GiB", 8),
    ("collectives ms", 14),
    ("GiB sent a rank and step", 0),
)


def print_scale_head(results: dict[str, Any]) -> None:
    """Device and column names, on stdout, before the first row."""
    environment = dict(results["environment"])
    rate = environment.pop("matmul_tflop_per_s", None)
    measured = "" if rate is None else f", bf16 matrix product {rate:.0f} TFLOP/s"
    device = environment.pop("device", "no rank has started")
    plain = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in environment.items()
    )
    print(f"{device}{measured}; {', '.join(plain)}")
    print("collectives ms: NCCL kernels of rank 0 in one step, overlapped or not; GiB sent: computed")
    print("  ".join(_pad(name, name, width) for name, width in _COLUMNS), flush=True)


def print_scale_row(row: dict[str, Any]) -> None:
    """One line, as soon as it is measured."""
    rows = row["rows"] * row["parallel"]["shard"]
    cells = [row["preset"], row["mesh"], str(row["gpus"]), f"{rows} x {length_label(row['seq_len'])}"]
    if row["step_ms"] is None:
        cells = [_pad(n, c, w) for (n, w), c in zip(_COLUMNS, cells, strict=False)]
        print("  ".join([*cells, row["status"]]), flush=True)
        return
    cells += [
        f"{row['tokens_per_s']:,.0f}",
        f"{row['tokens_per_s_per_gpu']:,.0f}",
        "-" if row["efficiency"] is None else f"{row['efficiency']:.1%}",
        "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['step_ms']:.1f} ({row['low_ms']:.1f}-{row['high_ms']:.1f})",
        "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
        _collectives(row),
        ", ".join(f"{axis} {size / 2**30:.3g}" for axis, size in row["sent_bytes"].items() if size) or "-",
    ]
    more = [] if row["status"] == "ok" else [row["status"]]
    print("  ".join([*(_pad(n, c, w) for (n, w), c in zip(_COLUMNS, cells, strict=True)), *more]))
    sys.stdout.flush()


def _collectives(row: dict[str, Any]) -> str:
    if row["collectives_ms"] is None:
        return "-"
    groups = {name: value for name, value in row["collectives_ms_by_group"].items() if name != "all"}
    split = f" ({', '.join(f'{name} {value:.1f}' for name, value in groups.items())})" if groups else ""
    return f"{row['collectives_ms']:.1f}{split}"


def _pad(name: str, text: str, width: int) -> str:
    return text.ljust(width) if name in ("preset", "mesh", "GiB sent a rank and step") else text.rjust(width)


def longest_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences: the longest row that ran on each number of devices, and what ended the search."""
    lines = []
    for key in dict.fromkeys((row["preset"], row["gpus"]) for row in rows if row["longest"]):
        tried = [row for row in rows if row["longest"] and (row["preset"], row["gpus"]) == key]
        ran = [row for row in tried if row["status"] == "ok"]
        text = f"{key[0]}, longest row on {key[1]} GPU{'s' * (key[1] > 1)}: "
        if ran:
            best = ran[-1]
            text += f"{length_label(best['seq_len'])} tokens ({best['tokens_per_s_per_gpu']:,.0f} tokens/s per GPU)"
        else:
            text += "none"
        if tried[-1]["status"] != "ok":
            text += f"; {length_label(tried[-1]['seq_len'])}: {tried[-1]['status']}"
        lines.append(text)
    return lines


def write_scale_csv(results: dict[str, Any], path: Path) -> None:
    """The rows, with the device beside each; what is by axis in columns of its own."""
    environment, rows = results["environment"], []
    for row in results["rows"]:
        flat = {"device": environment.get("device"), "dtype": environment.get("dtype"), **row}
        flat |= flat.pop("parallel")
        flat["reference"] = "x".join(map(str, flat["reference"]))
        sent, times = flat.pop("sent_bytes") or {}, flat.pop("collectives_ms_by_group") or {}
        flat |= {f"sent_bytes_{axis}": sent.get(axis) for axis in ("weights", "replicate", "sequence", "tensor")}
        flat["collectives_ms_by_group"] = "; ".join(f"{name} {value:.3f}" for name, value in times.items())
        rows.append(flat)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def plot_scale(results: dict[str, Any], path: Path) -> None:
    """Tokens/s a device, relative to one device, and memory, by number of devices; PNG, SVG or PDF by the file's ending."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("plot", "matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["status"] == "ok" and not row["longest"]]
    panels = [("efficiency", "tokens/s per GPU, relative to one GPU")]
    if any(row["peak_gib"] is not None for row in rows):
        panels.append(("peak_gib", "peak memory of a GPU (GiB)"))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.4), layout="constrained", squeeze=False)
    series = list(dict.fromkeys((row["preset"], row["mesh"]) for row in rows if row["mesh"] != "one"))
    counts = sorted({row["gpus"] for row in rows})
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for index, name in enumerate(series):
            mine = [row for row in rows if (row["preset"], row["mesh"]) == name and row[key] is not None]
            if not mine:
                continue
            first = mine[0]
            alone = [
                row
                for row in rows
                if (row["mesh"], row["preset"]) == ("one", name[0])
                and (row["rows"], row["seq_len"]) == tuple(first["reference"])
                and row[key] is not None
            ]
            points = [(row["gpus"], row[key]) for row in [*alone, *mine]]
            style = {"color": COLOURS[index % 7], "marker": MARKERS[index % 7], "markersize": 4.5}
            axis.plot(*zip(*points, strict=True), label=" ".join(name), linewidth=1.6, **style)
        if key == "efficiency":
            axis.axhline(0.9, color="0.5", linestyle="--", linewidth=1, label="90 %")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set(xscale="log", xlabel="GPUs", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if series:
        axes[0][0].legend(frameon=False, fontsize=8.5)
    environment = results["environment"]
    figure.suptitle(f"{environment.get('device')}: whole training steps, {environment.get('dtype')}", fontsize=10)
    figure.savefig(path, dpi=160)
    plt.close(figure)
