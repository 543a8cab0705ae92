"""Running a sweep: each cell is `tnllm train` (or its group's `trainer`) in a process of its own, several at once.

    finished = run_sweep(plan, Path("runs/evidence"), jobs=3, sets=[], limit_s=570, on_event=print)

DIR/cells/<cell>/ is the cell's run folder and console.log its output; cell.json, written once the cell ended, is its row.
DIR/results.csv and DIR/curves.csv are made from those after every cell; curves.csv has the validations of unfinished cells
too. A sweep that is stopped or killed loses nothing that ended: running it again continues cells from their checkpoint, or
repeats them where there is none.
"""

import ctypes
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

from tnllm.errors import UserError
from tnllm.files import only_writer, read_json, write_csv, write_text_atomic
from tnllm.modeling.flops import count_parameters
from tnllm.sweep.plan import TRAINERS, Cell, Plan, Row
from tnllm.sweep.table import CURVES, RESULTS, read_csv
from tnllm.training.config import load_recipe
from tnllm.training.metrics import read_metrics

ROW = "cell.json"
_SAVED = 143  # exit code of a run that a SIGTERM ended after it saved
_POLL_S = 0.2
_LOCK_WAIT_S = 60.0
_Running = tuple[Cell, "subprocess.Popen[bytes]"]


def run_sweep(
    plan: Plan,
    out: Path,
    jobs: int,
    sets: Sequence[str] = (),
    limit_s: float | None = None,
    on_event: Callable[[str], None] = print,
    keep: bool = False,
    known: Path | None = None,
) -> bool:
    """Run what is open of `plan` in `out`; returns whether all of it is done.

    `sets` go to every cell. After `limit_s` seconds the running cells are told to save and the sweep ends; the next call
    continues them. `keep`: checkpoints and weights of finished cells stay. `known` is a folder with the tables of the same
    plan, run elsewhere: its cells count as run. Raises UserError where `out` is in use, or one of them holds cells of
    another plan.
    """
    started = time.monotonic()
    with only_writer(out, wait_s=_LOCK_WAIT_S) as lock:
        if known is not None:
            _take_over(known, out)
        rows = read_rows(out)
        running: list[_Running] = []
        try:
            while limit_s is None or time.monotonic() - started < limit_s:
                waiting = _open_cells(plan, rows, {cell.name for cell, _ in running})
                if not waiting and not running:
                    break
                for cell in _startable(waiting, [cell for cell, _ in running], jobs):
                    on_event(f"{cell.name}: starts ({len(rows)} cells done)")
                    running.append((cell, _start(cell, out, sets, lock)))
                time.sleep(_POLL_S)
                running = _collect(running, rows, out, sets, on_event, keep)
        finally:
            # A limit, Ctrl-C or an error: every cell saves what it has.
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()
        _collect(running, rows, out, sets, on_event, keep)
        _write_tables(out, rows)
        return not _open_cells(plan, rows, set())


def _take_over(known: Path, out: Path) -> None:
    """Write the rows of `known` beside those of the cells that ran here, which come first."""
    curves: dict[str, list[list[Any]]] = {}
    for point in read_csv(known / CURVES):
        curves.setdefault(point["cell"], []).append([point["step"], point["tokens"], point["val_loss"]])
    for row in read_csv(known / RESULTS):
        file = out / "cells" / row["cell"] / ROW
        if row["status"] == "done" and not file.exists():
            whole = {
                **row,
                "overrides": row["overrides"] or "",
                "alone": row["alone"] == "True",
                "curve": curves.get(row["cell"], []),
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(file, json.dumps(whole, indent=1) + "\n")


def read_rows(out: Path) -> list[Row]:
    """The rows of all cells in `out` that ended, in the order of their names."""
    files = sorted((out / "cells").glob(f"*/*/{ROW}"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _open_cells(plan: Plan, rows: Sequence[Row], running: set[str]) -> list[Cell]:
    """Cells that could start now, in the order of the plan. Raises UserError where a row is of another plan."""
    by_name = {row["cell"]: row for row in rows}
    result = []
    for group in plan.groups.values():
        for cell in plan.cells(group, rows) or []:
            row = by_name.get(cell.name)
            if row is not None and row["overrides"] != _overrides(cell):
                raise UserError(
                    f"{cell.name} was run with {row['overrides']} and is planned with {_overrides(cell)}; "
                    "choose another --out, or remove its folder"
                )
            if row is None and cell.name not in running:
                result.append(cell)
    return result


def _startable(waiting: Sequence[Cell], running: Sequence[Cell], jobs: int) -> list[Cell]:
    """The cells to start beside `running`; a cell that must be alone waits for an empty machine, in its turn."""
    chosen: list[Cell] = []
    for cell in waiting:
        beside = [*running, *chosen]
        if len(beside) >= jobs or any(other.alone for other in beside) or (cell.alone and beside):
            break
        chosen.append(cell)
    return chosen


def _start(cell: Cell, out: Path, sets: Sequence[str], lock: int) -> "subprocess.Popen[bytes]":
    folder = out / "cells" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    flags = [part for item in [*cell.sets(), *sets] for part in ("--set", item)]
    before, after = TRAINERS[cell.trainer]
    command = [sys.executable, "-m", *before, cell.recipe, *flags, "--out", str(folder), *after]
    with open(folder / "console.log", "ab") as log:
        # The lock is held as long as a cell lives, so no second sweep meets one that outlived its own.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock], preexec_fn=_end_with_parent
        )


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the sweep is killed: a cell then saves and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def _collect(
    running: list[_Running],
    rows: list[Row],
    out: Path,
    sets: Sequence[str],
    on_event: Callable[[str], None],
    keep: bool,
) -> list[_Running]:
    """Write the rows of cells that ended; returns those still running."""
    left = []
    for cell, process in running:
        code = process.poll()
        if code is None:
            left.append((cell, process))
            continue
        if code in (_SAVED, -signal.SIGTERM):
            on_event(f"{cell.name}: stopped; the next call continues it")
            continue
        folder = out / "cells" / cell.name
        row = make_row(cell, folder, code, sets)
        write_text_atomic(folder / ROW, json.dumps(row, indent=1) + "\n")
        rows.append(row)
        _write_tables(out, rows)
        result = f"val_loss {row['val_loss']:.4f}" if row["status"] == "done" else row["status"]
        on_event(f"{cell.name}: {result}")
        if not keep:
            for name in ("checkpoints", "weights"):
                shutil.rmtree(folder / name, ignore_errors=True)
    return left


def make_row(cell: Cell, folder: Path, code: int, sets: Sequence[str]) -> Row:
    """One line of results.csv from a cell's run folder: what was asked, what came out, on what."""
    config = load_recipe(cell.recipe, [*cell.sets(), *sets])
    parameters = count_parameters(config.model)
    row: Row = {
        "cell": cell.name,
        "group": cell.group,
        "choice": cell.choice,
        "recipe": Path(cell.recipe).stem,
        "overrides": _overrides(cell),
        "seed": cell.seed,
        "kind": config.model.kind if cell.trainer == "tnllm" else cell.trainer,
        "parameters": parameters,
        "parameters_without_embedding": parameters - config.model.vocab_size * config.model.model_dim,
        "learning_rate": config.optimizer.learning_rate,
    }
    metrics = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    steps = [item for item in metrics if item.get("loss") is not None]
    checks = [item for item in metrics if item.get("val_loss") is not None]
    resolved = folder / "config.resolved.yaml"
    done = code == 0 and bool(checks) and checks[-1]["step"] == load_recipe(str(resolved)).total_steps
    environment = read_json(folder / "env.json") if (folder / "env.json").is_file() else {}
    # The first row holds the compilation.
    rates = [item["tokens_per_s"] for item in steps[1:]] or [item["tokens_per_s"] for item in steps]
    return {
        **row,
        "status": "done" if done else f"failed: {_last_line(folder / 'console.log')}",
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "train_loss": steps[-1]["loss"] if steps else None,
        "val_loss": checks[-1]["val_loss"] if done else None,
        "val_bpb": checks[-1]["val_bpb"] if done else None,
        **(_accuracies(checks[-1]) if done else {}),
        "tokens_per_s": round(median(rates)) if rates else None,
        "alone": cell.alone,
        "memory_gib": round(max(item["mem_gib"] for item in steps), 2) if steps else None,
        "skipped_updates": steps[-1]["skipped"] if steps else None,
        "data": str(environment.get("data", ""))[:12],
        "device": environment.get("device"),
        "torch": environment.get("torch"),
        "triton": next((found.version for found in distributions(name="triton")), None),
        "tnllm": environment.get("tnllm"),
        "date": str(environment.get("time", ""))[:10],
        "curve": curve(metrics),
    }


def _accuracies(check: Row) -> Row:
    by_pairs = check.get("val_accuracy_by_pairs", {})
    result = {"val_accuracy": check.get("val_accuracy")}
    return result | {f"accuracy_{pairs}": share for pairs, share in by_pairs.items()}


def _overrides(cell: Cell) -> str:
    return " ".join(f"{key}={value}" for key, value in cell.overrides.items())


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")[:300]


def _write_tables(out: Path, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: str(row["cell"]))
    write_csv(out / RESULTS, [{key: value for key, value in row.items() if key != "curve"} for row in ordered])
    curves = {row["cell"]: row["curve"] for row in ordered}
    for file in sorted((out / "cells").glob("*/*/metrics.jsonl")):
        name = str(file.parent.relative_to(out / "cells"))
        curves.setdefault(name, curve(read_metrics(file)))
    done = {row["cell"] for row in ordered if row["status"] == "done"}
    checks = [
        {"cell": name, "finished": name in done, "step": step, "tokens": tokens, "val_loss": loss}
        for name, points in sorted(curves.items())
        for step, tokens, loss in points
    ]
    write_csv(out / CURVES, checks)


def curve(metrics: Sequence[Row]) -> list[list[Any]]:
    """Step, tokens and loss of every validation in rows of metrics.jsonl."""
    return [[item["step"], item["tokens"], item["val_loss"]] for item in metrics if item.get("val_loss") is not None]
