"""The funnel of a cleaning run: what came in and went out of each step, why, and how fast. As JSON, text and HTML.

report = build_report(run)
write_report(out, report)          # OUT/report.json and OUT/report.html
print(render(report))
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnllm.cleaning.html import page
from tnllm.cleaning.shards import read_lines
from tnllm.errors import UserError
from tnllm.files import format_bytes, write_text_atomic

if TYPE_CHECKING:
    # A report is also read and shown where datatrove is not installed.
    from tnllm.cleaning.pipeline import CleanRun

JSON, HTML = "report.json", "report.html"
_MAX_NAMED = 20


def build_report(run: "CleanRun", self_clean: dict[str, Any] | None = None) -> dict[str, Any]:
    """Counts of a finished run, over all shards, whenever they were done."""
    stats = run.stats()
    steps: list[dict[str, Any]] = []
    for stage in ("filter", "dedup"):
        for name, counts in stats.get(stage, {}).items():
            if name not in ("write", "minhash"):
                steps.append(_row(name, counts))
    writer = stats["dedup" if "dedup" in stats else "filter"]["write"]
    passed = [(step["documents_in"], step["bytes_in"]) for step in steps[1:]]
    ends = [*passed, (_get(writer, "documents"), _get(writer, "bytes"))]
    for step, (documents, size) in zip(steps, ends, strict=True):
        step["documents_out"], step["bytes_out"] = documents, size
    steps += _round_rows(self_clean)
    filters, group = stats["filter"], stats.get("group", {}).get("group", {})
    report: dict[str, Any] = {
        "out": str(run.out),
        "input_bytes": run.input_bytes,
        "documents_in": steps[0]["documents_in"],
        "documents_out": steps[-1]["documents_out"],
        "bytes_out": steps[-1]["bytes_out"],
        "steps": steps,
        "minhash": _speed(filters["minhash"]) if "minhash" in filters else None,
        "languages": _prefixed(filters.get("language", {}), "language/"),
        "masked": _get(filters.get("personal", {}), "masked"),
        "duplicate_groups": _prefixed(group, "group_size/"),
        "tally": _tally(steps, self_clean, stats),
        "unreadable": _unreadable(run) if steps[0]["reasons"].get("unreadable") else [],
        "self_clean": self_clean,
    }
    return report


def self_clean_report(out: Path, found: dict[str, Any], tally: dict[str, int]) -> dict[str, Any]:
    """The same for `tnllm data self-clean` alone; `tally` counts the tallied field's values in the input."""
    steps = _round_rows(found)
    values: dict[str, Any] = {value: {"in": count, "out": count, "rejected": {}} for value, count in tally.items()}
    return {
        "out": str(out),
        "documents_in": steps[0]["documents_in"],
        "documents_out": steps[-1]["documents_out"],
        "bytes_out": steps[-1]["bytes_out"],
        "steps": steps,
        "languages": {},
        "duplicate_groups": {},
        "tally": _tally_rounds(values, found),
        "unreadable": [],
        "self_clean": found,
    }


def _round_rows(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    rows = []
    for round_ in (found or {}).get("rounds", []):
        columns = ("documents_in", "bytes_in", "documents_out", "bytes_out")
        row = {"step": f"self-clean {round_['round']}", "seconds": None, "reasons": round_["reasons"]}
        rows.append(row | {key: round_[key] for key in columns})
    return rows


def _get(counts: dict[str, Any], label: str) -> int:
    return int(counts.get(label, 0))


def _prefixed(counts: dict[str, Any], prefix: str) -> dict[str, int]:
    found = {label.removeprefix(prefix): int(n) for label, n in counts.items() if label.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _row(name: str, counts: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": name,
        "documents_in": _get(counts, "documents"),
        "bytes_in": _get(counts, "bytes"),
        "changed": _get(counts, "changed"),
        "reasons": _prefixed(counts, "rejected/"),
        **_speed(counts),
    }


def _speed(counts: dict[str, Any]) -> dict[str, Any]:
    seconds = counts["seconds"]
    rate = round(_get(counts, "documents") / seconds) if seconds else None
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


def _unreadable(run: "CleanRun") -> list[str]:
    """The first places that could not be read, and why."""
    found: list[str] = []
    for path in sorted((run.out / "rejected").glob("filter-*.jsonl.gz")):
        for record in read_lines(path):
            if record["rejected"]["reason"] == "unreadable":
                where, why = record["where"], record["rejected"]["why"]
                found.append(why if why.startswith(where) else f"{where}: {why}")
                if len(found) == _MAX_NAMED:
                    return found
    return found


def write_report(out: Path, report: dict[str, Any]) -> None:
    """OUT/report.json and OUT/report.html."""
    write_text_atomic(out / JSON, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text_atomic(out / HTML, page(report))


def read_report(out: Path) -> dict[str, Any]:
    """Read OUT/report.json. Raises UserError where there is none."""
    path = out / JSON
    if not path.is_file():
        raise UserError(
            f"{out} holds no {JSON}; give the folder of a finished 'tnllm data clean' or 'tnllm data dedup'"
        )
    return json.loads(path.read_text("utf-8"))


def render(report: dict[str, Any]) -> str:
    """The funnel as lines of text."""
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
        lines += _render_losses(report["self_clean"])
    if report["unreadable"]:
        lines += ["not read:", *(f"  {place}" for place in report["unreadable"])]
    return "\n".join(lines)


def _render_tally(tally: dict[str, Any]) -> list[str]:
    lines = [f"{'kind':22}{'in':>8}{'out':>8}{'removed':>9}  by"]
    for value, entry in tally.items():
        by = ", ".join(f"{step} {count:,}" for step, count in entry["rejected"].items() if count)
        share = 1 - entry["out"] / entry["in"] if entry["in"] else 0
        lines.append(f"{value:22}{entry['in']:>8,}{entry['out']:>8,}{share:>9.1%}  {by}".rstrip())
    return lines


def _render_losses(found: dict[str, Any]) -> list[str]:
    lines = ["held-out loss, bits per byte (nats a token), after equal steps of training on"]
    named = [(f"what round {row['round']} began with", row["held_out"]) for row in found["rounds"]]
    named.append(("what is left", found["after"]))
    if "random_subset" in found:
        named.append(("a random subset of that size", found["random_subset"]))
    return [*lines, *(f"  {name:30}{loss['bits_per_byte']:.4f}  ({loss['loss']:.4f})" for name, loss in named)]
