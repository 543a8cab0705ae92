"""Results of two evaluations, or of one and the paper, side by side.

rows = compare(read_results(Path("a.json")), read_results(Path("b.json")))
rows = compare(read_results(Path("a.json")), None, paper="385m")
"""

import math
from pathlib import Path
from typing import Any

from tnllm.errors import UserError, did_you_mean
from tnllm.evaluation.cards import PAPER_TASKS, find_card
from tnllm.files import read_json

# TransNormerLLM in the paper: arXiv 2405.17381, Table 2 (arXiv 2307.14995, Table 9 up to 7B). Percent; acc, but
# acc_norm for HS, ARC-c and OBQA; MMLU, CMMLU and C-Eval with 5 examples by those sets' own scripts.
COLUMNS = ("BoolQ", "PIQA", "HS", "WG", "ARC-e", "ARC-c", "OBQA", "MMLU", "CMMLU", "C-Eval")
PAPER: dict[str, tuple[float | None, ...]] = {
    "385m": (62.14, 66.70, 46.27, 54.46, 55.43, 27.99, 32.40, 25.90, 25.05, 25.24),
    "1b": (63.27, 72.09, 56.49, 60.38, 63.68, 35.24, 36.60, 27.10, 25.88, 26.01),
    "7b": (75.87, 80.09, 75.21, 66.06, 75.42, 44.40, 63.40, 43.10, 47.99, 43.18),
    "15b": (76.64, 81.56, 82.18, 75.61, 77.61, 50.51, 46.40, 60.06, None, 53.01),
}


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file of tnllm or lm-evaluation-harness, or the newest one below a folder. Raises UserError."""
    if path.is_dir():
        files = sorted(path.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise UserError(f"{path} holds no results_*.json; give a results file or the --out folder of an evaluation")
        path = files[-1]
    advice = "give a results_*.json that `tnllm eval --out DIR` or lm-eval wrote"
    results = read_json(path, advice)
    if not isinstance(results.get("results"), dict):
        raise UserError(f"{path} has no 'results'; {advice}")
    return results


def published(task: str, metric: str, size: str) -> float | None:
    """Return the paper's figure for a task and metric in percent, or None."""
    if size not in PAPER:
        raise UserError(f"the paper has no model {size!r}; allowed: {', '.join(PAPER)}{did_you_mean(size, PAPER)}")
    card = find_card(task) if task in PAPER_TASKS else None
    if card is None or card.paper not in COLUMNS or metric != card.paper_metric:
        return None
    return PAPER[size][COLUMNS.index(card.paper)]


def compare(first: dict[str, Any], second: dict[str, Any] | None, paper: str | None = None) -> list[dict[str, Any]]:
    """Return one row per common task and metric. A difference's standard error assumes that the two are independent.

    `notes` of a row say what makes its figures less than a score: a sample, a limit, other shots than the paper's.
    """
    rows = []
    for task, values in first["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            other = None if second is None else second["results"].get(task, {})
            if other is not None and not isinstance(other.get(key), int | float):
                continue
            error_key = f"{metric}_stderr,{filter_name}"
            row = {
                "task": task,
                "metric": metric,
                "filter": filter_name,
                "a": value,
                "a_stderr": _number(values, error_key),
            }
            if other is not None:
                errors = row["a_stderr"], _number(other, error_key)
                row |= {"b": other[key], "b_stderr": errors[1], "delta": other[key] - value}
                row["delta_stderr"] = None if None in errors else math.hypot(*errors)  # type: ignore[arg-type]
            if paper is not None:
                row["paper"] = published(task, metric, paper)
            row["notes"] = _notes(first, second, task, row.get("paper") is not None)
            rows.append(row)
    if not rows:
        raise UserError("the two results have no task and metric in common")
    return rows


def is_sample(results: dict[str, Any], task: str) -> bool:
    """Whether a task, or a group that it belongs to, was scored on the questions in the package."""
    groups = results.get("group_subtasks") or {}
    sampled = (results.get("tnllm") or {}).get("sampled", [])
    return task in sampled or any(task in members and is_sample(results, group) for group, members in groups.items())


def shots(results: dict[str, Any], task: str) -> int | None:
    """Examples of a task or group. The harness gives none for a group of groups; then its members' number if they agree."""
    known = results.get("n-shot") or {}
    if task in known:
        return known[task]
    counts = {shots(results, member) for member in (results.get("group_subtasks") or {}).get(task, [])}
    return counts.pop() if len(counts) == 1 else None


def _notes(first: dict[str, Any], second: dict[str, Any] | None, task: str, with_paper: bool) -> list[str]:
    def of(results: dict[str, Any]) -> list[str]:
        limit = (results.get("config") or {}).get("limit")
        notes = ["sample"] if is_sample(results, task) else []
        notes += [f"limit {limit:g}"] if isinstance(limit, int | float) else []
        count, wanted = shots(results, task), PAPER_TASKS.get(task)
        other = with_paper and None not in (count, wanted) and count != wanted
        return [*notes, f"{count} shots, not the paper's {wanted}"] if other else notes

    if second is None or of(first) == of(second):
        return of(first)
    sides = (("A", of(first)), ("B", of(second)))
    return [f"{side}: {', '.join(notes) or 'the complete set'}" for side, notes in sides]


def _number(values: dict[str, Any], key: str) -> float | None:
    value = values.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return what else differs between two evaluations, since it may explain a delta too."""
    lines = []
    for name, key in (
        ("number of examples", "n-shot"),
        ("task version", "versions"),
        ("questions and prompts", "task_hashes"),
    ):
        a, b = first.get(key) or {}, second.get(key) or {}
        tasks = [task for task in a if task in b and a[task] != b[task]]
        if tasks:
            more = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
            lines.append(f"{name} differs: {', '.join(tasks[:3])}{more}")
    for name, key in (("limit", "limit"), ("few-shot seed", "fewshot_seed"), ("dtype", "model_dtype")):
        values = [results.get("config", {}).get(key) for results in (first, second)]
        if values[0] != values[1]:
            lines.append(f"{name} differs: {values[0]} and {values[1]}")
    for label, results in (("A", first), ("B", second)):
        if sampled := (results.get("tnllm") or {}).get("sampled"):
            lines.append(f"{label} is a packaged sample, not a score: {', '.join(sampled)}")
    return lines
