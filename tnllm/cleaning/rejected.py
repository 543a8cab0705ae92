"""Rejected documents of a cleaning run, by step or reason.

for record in rejected_samples(Path("clean-out"), "near duplicate", count=3): record["text"], record["rejected"]
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnllm.cleaning.shards import read_lines
from tnllm.errors import UserError


def rejected(folder: Path) -> Iterator[dict[str, Any]]:
    """Every rejected record, each with `rejected`: step, reason and figures. Raises UserError where none are kept."""
    files = sorted((folder / "rejected").glob("*.jsonl.gz"))
    if not files:
        raise UserError(f"{folder} holds no rejected documents; clean with --keep-rejected")
    for path in files:
        yield from read_lines(path)


def rejected_samples(folder: Path, reason: str, count: int) -> list[dict[str, Any]]:
    """The first `count` records whose step is `reason` or whose reason contains it. UserError lists what there is."""
    found: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for record in rejected(folder):
        verdict = record["rejected"]
        reasons[f"{verdict['step']}: {verdict['reason']}"] += 1
        if len(found) < count and (reason == verdict["step"] or reason in verdict["reason"]):
            found.append(record)
    if not found and count:
        there = "; ".join(f"{name} ({number:,})" for name, number in reasons.most_common(12)) or "none at all"
        raise UserError(f"nothing was rejected for {reason!r}; there are: {there}")
    return found
