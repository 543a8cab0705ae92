"""What each step of a cleaning run received, kept and rejected, why, and how fast, as JSON, text and HTML.

report = build_report(run)
write_report(out, report)          # OUT/report.json and OUT/report.html
print(render(report))
for record in rejected_samples(out, "near duplicate", count=3): record["text"], record["rejected"]
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from tnllm import assets
from tnllm.cleaning.records import read_folder
from tnllm.data.folders import shown
from tnllm.errors import UserError
from tnllm.files import format_bytes, read_json, write_text_atomic

if TYPE_CHECKING:
    # Reports can also be read and shown where datatrove is not installed.
    from tnllm.cleaning.pipeline import CleanRun

JSON, HTML = "report.json", "report.html"
_MAX_NAMED = 20


def build_report(run: "CleanRun", self_clean: dict[str, Any] | None = None) -> dict[str, Any]:
    """Counts of a finished run, over all its shards and resumed parts."""
    stats = run.stats()
    steps: list[dict[str, Any]] = []
    for stage in ("filter", "dedup"):
        for name, counts in stats.get(stage, {}).items():
            if name not in ("write", "minhash"):
                steps.append(_row(name, counts))
    writer = stats["dedup" if "dedup" in stats else "filter"]["write"]
    passed = [(step["documents_in"], step["bytes_in"]) for step in steps[1:]]
    ends = [*passed, (int(writer.get("documents", 0)), int(writer.get("bytes", 0)))]
    for step, (documents, size) in zip(steps, ends, strict=True):
        step["documents_out"], step["bytes_out"] = documents, size
    steps += _round_rows(self_clean)
    filters, group = stats["filter"], stats.get("group", {}).get("group", {})
    return _ends(run.out, steps, self_clean) | {
        "input_bytes": run.input_bytes,
        "minhash": _speed(filters["minhash"]) if "minhash" in filters else None,
        "languages": _prefixed(filters.get("language", {}), "language/"),
        "masked": int(filters.get("personal", {}).get("masked", 0)),
        "duplicate_groups": _prefixed(group, "group_size/"),
        "tally": _tally(steps, self_clean, stats),
        "unreadable": list(_prefixed(filters["read"], "unreadable/"))[:_MAX_NAMED],
        "lost_fields": _prefixed(filters["read"], "lost/"),
    }


def self_clean_report(out: Path, rounds: dict[str, Any], tally: dict[str, int]) -> dict[str, Any]:
    """The same for `tnllm data self-clean`, which has no other steps; `tally` counts the tallied field in the input."""
    steps = _round_rows(rounds)
    values: dict[str, Any] = {value: {"in": count, "out": count, "rejected": {}} for value, count in tally.items()}
    nothing: dict[str, Any] = {"languages": {}, "duplicate_groups": {}, "unreadable": [], "lost_fields": {}}
    return _ends(out, steps, rounds) | nothing | {"tally": _tally_rounds(values, rounds)}


def _ends(out: Path, steps: list[dict[str, Any]], self_clean: dict[str, Any] | None) -> dict[str, Any]:
    kept = {key: steps[-1][key] for key in ("documents_out", "bytes_out")}
    return {
        "out": shown(out),
        "documents_in": steps[0]["documents_in"],
        **kept,
        "steps": steps,
        "self_clean": self_clean,
    }


def _round_rows(rounds: dict[str, Any] | None) -> list[dict[str, Any]]:
    rows = []
    for round_ in (rounds or {}).get("rounds", []):
        columns = ("documents_in", "bytes_in", "documents_out", "bytes_out")
        row = {"step": f"self-clean {round_['round']}", "seconds": None, "reasons": round_["reasons"]}
        rows.append(row | {key: round_[key] for key in columns})
    return rows


def _prefixed(counts: dict[str, Any], prefix: str) -> dict[str, int]:
    chosen = {label.removeprefix(prefix): int(n) for label, n in counts.items() if label.startswith(prefix)}
    return dict(sorted(chosen.items(), key=lambda item: (-item[1], item[0])))


def _row(name: str, counts: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": name,
        "documents_in": int(counts.get("documents", 0)),
        "bytes_in": int(counts.get("bytes", 0)),
        "changed": int(counts.get("changed", 0)),
        "reasons": _prefixed(counts, "rejected/"),
        **_speed(counts),
    }


def _speed(counts: dict[str, Any]) -> dict[str, Any]:
    seconds = counts["seconds"]
    rate = round(int(counts.get("documents", 0)) / seconds) if seconds else None
    return {"seconds": round(seconds, 3), "documents_per_s_per_core": rate}


def _tally(steps: list[dict[str, Any]], rounds: dict[str, Any] | None, stats: Any) -> dict[str, Any]:
    """Value of the tallied field → documents in, and rejected by each step."""
    read = stats["filter"]["read"]
    values: dict[str, Any] = {value: {"in": count, "rejected": {}} for value, count in _prefixed(read, "all/").items()}
    for stage in ("filter", "dedup"):
        for name, counts in stats.get(stage, {}).items():
            for value, count in _prefixed(counts, "tally/").items():
                values[value]["rejected"][name] = count
    for entry in values.values():
        entry["out"] = entry["in"] - sum(entry["rejected"].values())
    return _tally_rounds(values, rounds)


def _tally_rounds(values: dict[str, Any], rounds: dict[str, Any] | None) -> dict[str, Any]:
    for round_ in (rounds or {}).get("rounds", []):
        for value, entry in values.items():
            after = round_["kept_by_tally"].get(value, 0)
            entry["rejected"][f"self-clean {round_['round']}"] = entry["out"] - after
            entry["out"] = after
    return values


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write OUT/report.json, and OUT/report.html: tables and bars, without scripts or links."""
    write_text_atomic(out / JSON, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": format_bytes, "count": "{:,}".format}
    template = environment.from_string((assets.folder() / "cleaning_report.html").read_text("utf-8"))
    groups = {f"groups of {size}": count for size, count in sorted(report["duplicate_groups"].items())}
    losses = _losses(report["self_clean"]) if report["self_clean"] else []
    write_text_atomic(out / HTML, template.render(report, groups=groups, losses=losses) + "\n")


def read_report(out: Path) -> dict[str, Any]:
    """Read OUT/report.json. Raises UserError if there is none."""
    return read_json(out / JSON, "give the folder of a finished 'tnllm data clean' or 'tnllm data dedup'")


def rejected_samples(folder: Path, reason: str, count: int) -> list[dict[str, Any]]:
    """The first `count` rejected records of the step `reason`, or whose reason contains it.

    Each has a field `rejected` with step, reason and figures. Raises UserError, with the reasons there are, if none match.
    """
    if not any((folder / "rejected").glob("*.jsonl.gz")):
        raise UserError(f"{folder} holds no rejected documents; clean with --keep-rejected")
    samples: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for record in read_folder(folder / "rejected"):
        verdict = record["rejected"]
        reasons[f"{verdict['step']}: {verdict['reason']}"] += 1
        if len(samples) < count and (reason == verdict["step"] or reason in verdict["reason"]):
            samples.append(record)
    if not samples and count:
        known = "; ".join(f"{name} ({number:,})" for name, number in reasons.most_common(12)) or "none at all"
        raise UserError(f"nothing was rejected for {reason!r}; there are: {known}")
    return samples


def render(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [
        f"{'step':14}{'in':>10}{'out':>10}{'bytes in':>12}{'bytes out':>12}{'docs/s/core':>13}  most frequent reasons"
    ]
    for step in report["steps"]:
        rate = step.get("documents_per_s_per_core")
        reasons = ", ".join(f"{why} {count:,}" for why, count in list(step["reasons"].items())[:3] if count)
        lines.append(
            f"{step['step']:14}{step['documents_in']:>10,}{step['documents_out']:>10,}{format_bytes(step['bytes_in']):>12}"
            f"{format_bytes(step['bytes_out']):>12}{f'{rate:,}' if rate else '':>13}  {reasons}".rstrip()
        )
    if report["languages"]:
        mix = ", ".join(f"{name} {count:,}" for name, count in list(report["languages"].items())[:8])
        lines.append(f"languages: {mix}")
    if report["duplicate_groups"]:
        sizes = ", ".join(f"{count:,} of {size}" for size, count in sorted(report["duplicate_groups"].items()))
        lines.append(f"groups of duplicates by size: {sizes}")
    if report["tally"]:
        lines += _render_tally(report["tally"])
    if report["self_clean"]:
        lines.append("held-out loss, bits per byte (nats a token), after equal steps of training on")
        for name, loss in _losses(report["self_clean"]):
            lines.append(f"  {name:30}{loss['bits_per_byte']:.4f}  ({loss['loss']:.4f})")
    if report.get("lost_fields"):
        lines.append("fields that could not be kept, and in how many documents:")
        lines += [f"  {name} ({count:,})" for name, count in list(report["lost_fields"].items())[:_MAX_NAMED]]
    if report["unreadable"]:
        lines += ["not read:", *(f"  {where}" for where in report["unreadable"])]
    return "\n".join(lines)


def _render_tally(tally: dict[str, Any]) -> list[str]:
    lines = [f"{'kind':22}{'in':>8}{'out':>8}{'removed':>9}  by"]
    for value, entry in tally.items():
        by = ", ".join(f"{step} {count:,}" for step, count in entry["rejected"].items() if count)
        share = 1 - entry["out"] / entry["in"] if entry["in"] else 0
        lines.append(f"{value:22}{entry['in']:>8,}{entry['out']:>8,}{share:>9.1%}  {by}".rstrip())
    return lines


def _losses(rounds: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """What each model was trained on, and its held-out loss."""
    losses = [(f"what round {row['round']} began with", row["held_out"]) for row in rounds["rounds"]]
    losses.append(("what is left", rounds["after"]))
    if "random_subset" in rounds:
        losses.append(("a random subset of that size", rounds["random_subset"]))
    return losses
