"""`tnllm sweep`: many runs from one file, and their table."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tnllm.cli.options import SETS, examples

if TYPE_CHECKING:
    from tnllm.sweep.plan import Plan

EPILOG = examples(
    "tnllm sweep recipes/evidence/loss.yaml --out runs/evidence --jobs 3 --set data.path=CORPUS",
    "tnllm sweep recipes/evidence/loss.yaml --report docs/evidence",
)


def command(
    file: Path = typer.Argument(help="A sweep file: groups of recipes, overrides, grids and seeds."),
    out: Path | None = typer.Option(None, help="Its folder; run again to continue. Default: runs/<file name>."),
    jobs: int = typer.Option(1, min=1, help="Cells that run at once."),
    sets: list[str] = SETS,
    limit_minutes: float | None = typer.Option(
        None, min=0.0, help="Save and end after this time; the next call continues."
    ),
    keep: bool = typer.Option(False, "--keep", help="Keep checkpoints and weights of finished cells."),
    known: Path | None = typer.Option(
        None, help="A folder with tables of cells that ran elsewhere, which are not run again."
    ),
    list_cells: bool = typer.Option(False, "--list", help="Print the cells and stop; nothing runs."),
    report: Path | None = typer.Option(None, help="Run nothing: print this folder's table, draw its charts."),
) -> None:
    """Train the cells of a sweep file, each in a process of its own, and write one table of them."""
    from tnllm.errors import RunError, UserError
    from tnllm.sweep.plan import read_plan

    if report is not None and not report.is_dir():
        raise UserError(f"--report is {report}, which is not a folder; give one with results.csv in it")
    if known is not None and not known.is_dir():
        raise UserError(f"--known is {known}, which is not a folder; give one with results.csv and curves.csv in it")
    plan = read_plan(file, sets)
    if list_cells:
        for group in plan.groups.values():
            for cell in plan.examples(group):
                after = f"  (after the best of {', '.join(group.best_of)})" if group.best_of else ""
                print(f"{cell.name}{after}")
        return
    if report is not None:
        _show(plan, report)
        return
    from tnllm.sweep.run import run_sweep

    out = out or Path("runs") / file.stem
    done = run_sweep(plan, out, jobs, sets, None if limit_minutes is None else 60 * limit_minutes, _say, keep, known)
    failed = _show(plan, out)
    if not done:
        _say("cells are open; run the same command again to continue")
    if failed:
        raise RunError(f"{failed} cells failed; the table names them, console.log in their folders says why")


def _say(text: str) -> None:
    import sys
    import time

    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _show(plan: "Plan", folder: Path) -> int:
    """Print the table of `folder` and draw its charts; returns how many cells failed."""
    from tnllm.errors import MissingExtra
    from tnllm.files import format_count, write_bytes_atomic
    from tnllm.sweep.chart import draw
    from tnllm.sweep.table import CURVES, REPEATS, RESULTS, read_csv, summarize
    from tnllm.tables import print_table

    rows, curves = read_csv(folder / RESULTS), read_csv(folder / CURVES)
    repeats = read_csv(folder / REPEATS) if (folder / REPEATS).is_file() else []
    order = list(plan.groups)
    rows.sort(key=lambda row: order.index(row["group"]) if row["group"] in order else len(order))
    lines = summarize(rows)
    table = [
        [
            line.group, line.choice, format_count(line.tokens), str(len(line.losses)),
            "failed" if line.loss is None else f"{line.loss:.4f}",
            "" if line.spread is None else f"{line.spread:.4f}",
            "" if not line.bits else f"{sum(line.bits) / len(line.bits):.4f}",
            "" if not line.accuracies else f"{sum(line.accuracies) / len(line.accuracies):.1%}",
            format_count(line.tokens_per_s),
        ]
        for line in lines
    ]  # fmt: skip
    columns = ["group", "choice", "tokens", "seeds", "val_loss", "spread", "val_bpb", "accuracy", "tokens/s"]
    print_table(columns, table, right=columns[2:])
    names = {row["cell"] for row in rows}
    for row in rows:
        if row["status"] != "done":
            print(f"{row['cell']}: {row['status']}")
    left: list[str] = []
    for group in plan.groups.values():
        if plan.cells(group, rows) == []:
            print(f"{group.name}: nothing to start from, every cell of {', '.join(group.best_of)} failed")
        else:
            left += [cell.name for cell in plan.examples(group) if cell.name not in names]
    print(f"{len(rows)} cells ran, {len(left)} are open{': ' if left else ''}{'; '.join(left)}")
    for chart in plan.charts:
        try:
            picture = draw(chart, rows, curves, repeats)
        except MissingExtra as error:
            _say(str(error))
            break
        if picture is not None:
            write_bytes_atomic(folder / f"{chart.name}.png", picture)
            _say(f"{folder / f'{chart.name}.png'}")
    return sum(line.failed for line in lines)
