"""What each benchmark shows: its columns, sentences and charts, written by `tnllm.bench.report`."""

from collections.abc import Callable
from pathlib import Path

from tnllm.bench.report import (
    Form,
    Panel,
    Row,
    cell,
    draw,
    environment_line,
    length_label,
    lines,
    print_line,
    print_table,
    verdict,
)
from tnllm.bench.scale import ONE
from tnllm.parallel.traffic import TRAFFIC_AXES


def print_results(results: Row) -> None:
    """bench-attn: device, accuracy, times, on stdout."""
    print(environment_line(results["environment"]))
    errors: list[tuple[str, Form]] = [(key, f"{{{key}:.2e}}") for key in ("o", "dq", "dk", "dv")]
    columns = [("provider", "{provider}"), *errors, ("limit", "{limit:g}"), ("", verdict), ("differs", "{differs}")]
    print_table("relative RMS error against float64", columns, results["accuracy"])
    shape = "{batch} x {heads} x {length} x {head_dim}"
    columns = [
        ("B x H x T x D", shape), ("provider", "{provider}"), ("fwd ms", _spread("fwd")),
        ("x floor", "{fwd_over_floor:.3g}"), ("of sheet", "{fwd_sheet_share:.0%}"),
        ("TB/s", "{fwd_tb_per_s:.2g}"), ("TFLOP/s", "{fwd_tflop_per_s:.3g}"),
        ("fwd+bwd ms", _spread("fwd_bwd")), ("x floor", "{fwd_bwd_over_floor:.3g}"),
        ("of sheet", "{fwd_bwd_sheet_share:.0%}"), ("extra MiB", "{extra_mib:.0f}"),
    ]  # fmt: skip
    title = "time (median; 20th to 80th percentile) and memory"
    print_table(title, columns, results["rows"], group=lambda row: cell(shape, row))
    if any(row["extrapolated_from"] is not None for row in results["rows"]):
        print("from: not timed, but extrapolated from this shorter length in proportion to the work")


def _spread(key: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        median, low, high = row[f"{key}_ms"], row[f"{key}_low_ms"], row[f"{key}_high_ms"]
        if median is None:
            return "-"
        digits = max(0, 3 - len(str(int(median)))) + (1 if median < 1 else 0)
        if row["extrapolated_from"] is not None:
            return f"{median:.{digits}f} from {length_label(row['extrapolated_from'])}"
        return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    return text


def print_errors(environment: Row, rows: list[Row]) -> None:
    """bench-attn --accuracy: errors against float64 by length, slope and provider, on stdout."""
    print(environment_line(environment))
    errors = [(key, f"{{{key}:.2e}}") for key in ("o", "dq", "dk", "dv", "state")]
    columns = [("length", "{length:tokens}"), ("slope", "{slope:g}"), ("provider", "{provider}"), *errors]
    print_table("relative RMS error against float64", columns, rows)


def plot_attention(results: Row, path: Path) -> None:
    """Time and memory against length, log axes; what was timed, not what was extrapolated."""
    rows, environment = [row for row in results["rows"] if row["extrapolated_from"] is None], results["environment"]
    panels = []
    for key, label in (
        ("fwd_ms", "forward (ms)"),
        ("fwd_bwd_ms", "forward + backward (ms)"),
        ("extra_mib", "extra memory, forward + backward (MiB)"),
    ):
        floor = sorted({(row["length"], row[f"floor_{key}"]) for row in rows if f"floor_{key}" in row})
        panels.append(Panel(label, lines(rows, "{provider}", "length", key), log=True, dotted=("memory floor", floor)))
    spans = [sorted({row[key] for row in rows}) for key in ("batch", "heads", "head_dim")]
    batch, heads, dim = (str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)
    draw(f"{environment['device']}: batch {batch}, {heads} heads of {dim}, {environment['dtype']}", panels, path)


_STEPS_TITLE = "{device}: full training steps, {dtype}"
_STEP_MS = "{step_ms:.1f} ({low_ms:.1f}-{high_ms:.1f})"
_TRAIN_CASE: list[tuple[str, int, Form]] = [
    ("preset", -7, "{preset}"), ("kind", -11, "{kind}"), ("T", 7, "{seq_len:tokens}"), ("batch", 5, "{rows}"),
]  # fmt: skip
_TRAIN = [
    *_TRAIN_CASE, ("tokens/s", 10, "{tokens_per_s:,.0f}"), ("MFU", 6, "{mfu:.1%}"), ("of sheet", 8, "{mfu_sheet:.1%}"),
    ("ms/step (20-80 %)", 26, _STEP_MS),
    ("peak GiB", 8, "{peak_gib:.2f}"), ("first step s", 12, "{compile_s:.1f}"),
    ("loss", 14, "{first_loss:.2f} > {last_loss:.2f}"),
]  # fmt: skip
_TRAIN_CHECK = (
    "check against fp32 on the CPU, {preset} {kind}{mode}: loss {loss:.1e} (limit {loss_limit:g}), "
    "gradients {gradient:.1e} (limit {gradient_limit:g}): {verdict}"
)


def print_training_head(results: Row) -> None:
    """bench-train: device, checks and column names, on stdout, before the first row."""
    print(environment_line(results["environment"]))
    for row in results["accuracy"]:
        mode = _recomputing(row["activation_checkpointing"])
        print(cell(_TRAIN_CHECK, {**row, "mode": mode, "verdict": verdict(row)}))
    print_line(_TRAIN)


def print_training_row(row: Row) -> None:
    """One line, as soon as it is measured."""
    if row["step_ms"] is None:
        print_line(_TRAIN_CASE, row, ": ".join(filter(None, (row["status"], row["reason"]))))
        return
    status = "" if row["status"] == "ok" else row["status"]
    print_line(_TRAIN, row, f"{status}{_recomputing(row['activation_checkpointing'])}".strip())


def _recomputing(mode: str) -> str:
    return "" if mode == "none" else f" with {mode} recomputation"


def compare_training(rows: list[Row]) -> list[str]:
    """Sentences: speed over the baseline's at each length, and how constant it is over lengths."""
    speeds: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["status"] == "ok":
            kinds = speeds.setdefault(row["preset"] + _recomputing(row["activation_checkpointing"]), {})
            kinds.setdefault(row["kind"], {})[row["seq_len"]] = row["tokens_per_s"]
    sentences = []
    for name, kinds in speeds.items():
        theirs = kinds.get("transformer", {})
        ratios = [
            f"{speed / theirs[length]:.2f} at {length_label(length)}"
            for length, speed in kinds.get("transnormer", {}).items()
            if length in theirs
        ]
        if ratios:
            sentences.append(f"{name}: transnormer over transformer, tokens/s: {', '.join(ratios)}")
        for kind in ("transnormer", "transformer"):
            if len(found := kinds.get(kind, {}).values()) > 1:
                share = min(found) / max(found)
                sentences.append(f"{name}: {kind}'s slowest length has {share:.0%} of its fastest's speed")
    return sentences


def plot_training(results: Row, path: Path) -> None:
    """Tokens/s, utilisation and memory against length."""
    rows = [{**row, "mode": _recomputing(row["activation_checkpointing"])} for row in results["rows"]]
    panels = []
    for key, label, form in (
        ("tokens_per_s", "training speed (tokens/s)", ",.0f"),
        ("mfu", "FLOP utilisation", ".0%"),
        ("peak_gib", "peak memory (GiB)", ",.0f"),
    ):
        done = [row for row in rows if row["status"] == "ok"]
        panels.append(Panel(label, lines(done, "{preset} {kind}{mode}", "seq_len", key), form=form))
    draw(cell(_STEPS_TITLE, results["environment"]), panels, path)


def print_decode(results: Row) -> None:
    """bench-decode: device, accuracy, batch 1 by position, every batch, on stdout."""
    print(environment_line(results["environment"]))
    columns: list[tuple[str, Form]] = [
        ("provider", "{provider}"), ("full forward", "{forward_error:.2e}"), ("step", "{step_error:.2e}"),
        ("limit", "{limit:.2e}"), ("", verdict),
    ]  # fmt: skip
    print_table("logits against a wider dtype, relative RMS error", columns, results["accuracy"])
    columns = [
        ("preset", "{preset}"), ("provider", "{provider}"), ("batch", "{batch}"), ("position", "{position:tokens}"),
        ("step ms", "{step_ms:.4g} ({low_ms:.4g}-{high_ms:.4g})"), ("tokens/s", "{tokens_per_s:.4g}"),
        ("of the limit", "{bandwidth_share:.0%}"), ("of sheet", "{sheet_share:.0%}"), ("weights GiB", "{weight_gib:.3g}"),
        ("state GiB", "{state_gib:.3g}"), ("peak GiB", "{peak_gib:.3g}"),
    ]  # fmt: skip
    print_table(
        "a decoding step (median; 20th to 80th percentile)",
        columns,
        results["rows"],
        ("preset", "provider"),
        lambda row: (row["provider"], row["sweep"], row["position"] if row["sweep"] == "batch" else 0),
    )
    flat = [row["step_ms"] for row in results["rows"] if row["sweep"] == "position"]
    if len(flat) > 1:
        spread = max(flat) / min(flat) - 1
        print(f"tnllm, batch 1: slowest position {spread:.1%} above the fastest")
    columns = [
        ("text", "{text}"), ("plain tokens/s", "{plain_tokens_per_s:.4g}"), ("lookup", "{lookup_tokens_per_s:.4g}"),
        ("ratio", "{ratio:.2f} ({low_ratio:.2f}-{high_ratio:.2f})"), ("proposed", "{proposed}"),
        ("accepted", "{accepted_share:.0%}"), ("equal texts", "{equal_share:.0%}"),
    ]  # fmt: skip
    if "lookup" in results:
        print_table("prompt lookup, in turns (median; least and most)", columns, results["lookup"], ("text",))
    for row in results["skipped"]:
        print(cell("skipped: {provider}, batch {batch}, position {position:tokens} ({reason})", row))


def plot_decode(results: Row, path: Path) -> None:
    """Latency by position, tokens per second by batch and memory by batch."""
    rows = sorted(results["rows"], key=lambda row: (row["provider"] != "tnllm", row["position"]))
    names = {"tnllm": "tnllm", "transformer": "Transformer"}
    alone = [row for row in rows if row["sweep"] == "position" or (row["provider"] != "tnllm" and row["batch"] == 1)]
    by_position = lines(alone, lambda row: names[row["provider"]], "position", "step_ms")
    panels = [Panel("ms per token, batch 1", by_position, "position (tokens read)")]
    batches = [row for row in rows if row["sweep"] == "batch"]
    for key, label in (("tokens_per_s", "tokens/s"), ("state_gib", "state or cache (GiB)")):
        by_batch = lines(
            batches,
            lambda row: (
                "tnllm, any position" if row["provider"] == "tnllm" else cell("Transformer, {position:tokens}", row)
            ),
            "batch",
            key,
        )
        panels.append(Panel(label, by_batch, "batch", log=True))
    title = cell("decoding {preset}, {device}, {dtype}", {**(rows[0] if rows else {}), **results["environment"]})
    draw(title, panels, path)


def _share(row: Row) -> str:
    return f"{row['efficiency']:.0%}" + ("" if row["base_gpus"] == 1 else f" of {row['base_gpus']}")


def _comm(row: Row) -> str:
    return cell("{comm_ms:.1f}" if row["comm_exposed_ms"] is None else "{comm_ms:.1f} ({comm_exposed_ms:.1f})", row)


def _sent(row: Row) -> str:
    sent = sum(row[f"sent_{axis}"] or 0 for axis in TRAFFIC_AXES)
    return "-" if row["mesh"] == ONE else cell("{sent:bytes}", {"sent": sent})


def _mesh(row: Row) -> str:
    return "-" if row["mesh"] == ONE else row["mesh"]


_SCALE_CASE: list[tuple[str, int, Form]] = [
    ("preset", -6, "{preset}"), ("GPUs", 4, "{gpus}"), ("mesh", -8, _mesh), ("scaling", -22, "{scaling}"),
    ("rows x T", 9, "{rows} x {seq_len:tokens}"),
]  # fmt: skip
_SCALE = [
    *_SCALE_CASE, ("tokens/s", 9, "{tokens_per_s:,.0f}"), ("per GPU / one", 13, _share), ("MFU", 6, "{mfu:.1%}"),
    ("of sheet", 8, "{mfu_sheet:.1%}"),
    ("ms/step (20-80 %)", 24, _STEP_MS), ("peak GiB", 8, "{peak_gib:.2f}"), ("comm ms (exposed)", 17, _comm),
    ("sent a step", 11, _sent),
]  # fmt: skip
_SCALE_CHECK = (
    "loss {loss_difference:.1e} (limit {loss_limit:g}), gradient norm {norm_difference:.1e} (limit {norm_limit:g})"
)


def print_environment(environment: Row) -> None:
    """bench-scale: device, versions and column names, on stdout, before the first row."""
    print(environment_line(environment))
    print_line(_SCALE)


def print_check(row: Row) -> None:
    name = cell("check of ten steps against one GPU, {preset} {mesh} on {gpus}: ", row)
    result = f"{cell(_SCALE_CHECK, row)}: {verdict(row)}" if row["status"] == "ok" else cell("{status}: {reason}", row)
    print(name + result, flush=True)


def print_row(row: Row) -> None:
    """One line for a timed case, or for the longest row."""
    if "step_ms" not in row:
        print(longest_line(row), flush=True)
    elif row["status"] == "ok":
        print_line(_SCALE, row)
    else:
        print_line(_SCALE_CASE, row, f"{row['status']}: {row['reason']}" if row["reason"] else row["status"])


def longest_line(row: Row) -> str:
    name = f"longest row, {row['preset']}, {_mesh(row)} on {row['gpus']}: "
    reason = f"{row['status']}: {row.get('reason', '')}"
    if row.get("longest") is None:
        return f"{name}not found ({reason})"
    if row["status"] == "ok":
        return f"{name}at least {length_label(row['longest'])} tokens (the search ends there)"
    ended = "does not" if row["status"] == "out of memory" else reason
    return cell(f"{name}{{longest:tokens}} tokens fit, {{tried:tokens}}: ", row) + ended


def summary(rows: list[Row]) -> list[str]:
    """Sentences: bytes sent along each axis, counted and computed, and whether long rows cost more per token."""
    sentences = []
    done = [row for row in rows if row["status"] == "ok" and row["mesh"] != ONE]
    for row in done:
        parts = []
        for axis in TRAFFIC_AXES:
            if row[f"sent_{axis}"] and axis != "other":
                time = "" if row[f"ms_{axis}"] is None else f", {{ms_{axis}:.1f}} ms"
                parts.append(cell(f"{axis} {{sent_{axis}:bytes}}{time}", row))
        if parts:
            name = cell("{preset} {mesh} on {gpus}: a rank sends a step, counted: ", row)
            sentences.append(f"{name}{'; '.join(parts)}{cell(' (computed: {computed_bytes:bytes})', row)}")
    for row in done:
        if row["sequence"] == row["gpus"] and row["base_gpus"] == 1:
            sentences.append(
                f"{row['preset']} {row['mesh']}: a row {row['gpus']} times as long on {row['gpus']} ranks takes "
                f"{1 / row['efficiency']:.2f} times one rank's time per token of a rank"
            )
    return sentences


def plot_scaling(results: Row, path: Path) -> None:
    """Throughput per GPU relative to one GPU's, length of a row and memory, against the number of GPUs."""
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    cpu = results["environment"]["device"].startswith("cpu")
    word, words = ("process", "processes") if cpu else ("GPU", "GPUs")
    numbers = sorted({row["gpus"] for row in results["rows"]})
    panels = [
        _scale_panel(rows, rows, "efficiency", f"throughput per {word}, share of one {word}'s", ".0%"),
        _scale_panel(results["longest"], rows, "longest", "longest row that fits (tokens)", "tokens"),
        _scale_panel(rows, rows, "peak_gib", f"peak memory of a {word} (GiB)", ",.0f"),
    ]
    panels[0].dotted = ("_one", [(numbers[0], 1.0), (numbers[-1], 1.0)])
    if not any(y for panel in panels[1:] for _, points in panel.lines for _, y in points):
        panels.append(_scale_panel(rows, rows, "per_gpu", f"throughput per {word} (tokens/s)", ",.0f"))
    for panel in panels:
        panel.xlabel = f"number of {words}"
    draw(cell(_STEPS_TITLE, results["environment"]), panels, path)


def _scale_panel(source: list[Row], timed: list[Row], key: str, label: str, form: str) -> Panel:
    """A line for each mesh of `timed`; its first point is one GPU, with rows as long."""
    points: list[Row] = []
    for preset, mesh in dict.fromkeys((row["preset"], row["mesh"]) for row in timed if row["mesh"] != ONE):
        mine = [row for row in source if row["preset"] == preset and row["mesh"] == mesh]
        alone = [row for row in source if row["preset"] == preset and row["mesh"] == ONE] if mine else []
        if key != "longest":
            long = any(row["sequence"] > 1 for row in mine)
            alone = [row for row in alone if (row["rows"] == 1) == long][:1] or alone[:1]
        name = f"{preset} {mesh}" + (f", {mine[0]['scaling']}" if key == "efficiency" else "")
        points += [{**row, "name": name} for row in [*alone, *mine]]
    return Panel(label, lines(points, "{name}", "gpus", key), form=form)


def _two(key: str) -> str:
    return f"{{{key}_p50_ms:.4g}} / {{{key}_p99_ms:.4g}}"


def _prompt(row: Row) -> str:
    return cell("{prefix_tokens} + {prompt_tokens}" if row["prefix_tokens"] else "{prompt_tokens}", row)


# bench-serve: a line for each number of streams. Times are medians and 99th percentiles.
SERVE: list[tuple[str, int, Form]] = [
    ("streams", 7, "{streams}"), ("prompt", 11, _prompt), ("tokens", 6, "{tokens}"),
    ("complete", 12, "{whole} of {requests}"),
    ("first token ms", 15, _two("first")), ("between texts ms", 16, _two("gap")), ("ms a token", 15, _two("token")),
    ("requests/s", 10, "{requests_per_s:.3g}"), ("tokens/s", 8, "{tokens_per_s:.0f}"),
    ("server MiB", 10, "{memory_peak_mib:.0f}"), ("GPU MiB", 8, "{device_peak_mib:.0f}"),
]  # fmt: skip
