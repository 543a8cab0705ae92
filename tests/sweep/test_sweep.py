"""A sweep: what its file says, what it refuses, and that a kill changes nothing in its table."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tnllm.errors import UserError
from tnllm.files import write_csv
from tnllm.sweep.chart import draw, power_law
from tnllm.sweep.plan import Chart, read_plan
from tnllm.sweep.run import _accuracies, read_rows, run_sweep
from tnllm.sweep.table import CURVES, RESULTS, read_csv, summarize
from tnllm.tokenizer import train_tokenizer

PLAN = """
groups:
  rate:
    recipe: small
    grid: {optimizer.learning_rate: [1e-3, 1e-2]}
  seeds:
    best_of: [rate]
    seeds: [1, 2]
  change:
    best_of: [rate]
    variants: [{model.position: decay}, {model.gate: none, model.glu_dim: 56}]
charts:
  rates: {x: optimizer.learning_rate, groups: [rate]}
  tokens: {groups: [rate, seeds]}
  cells: {x: cell, groups: [rate, seeds, change]}
"""
RECIPE = """
model: {preset: tiny, vocab_size: 320, model_dim: 32, num_layers: 2, glu_dim: 48}
data: {seq_len: 32, val_fraction: 0.1}
train: {max_steps: 40, global_batch_tokens: 256, micro_batch_size: 4, device: cpu}
schedule: {warmup_steps: 2}
eval: {every_steps: 20, tokens: 500}
checkpoint: {every_steps: 10}
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file with its recipe, a corpus and a tokenizer beside it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = "one two three four five six seven eight nine ten " * 60
    (tmp_path / "corpus.txt").write_text("".join(f"{text[i : i + 300]}\n" for i in range(0, 2000, 7)))
    more = "the quick brown fox jumps over a lazy dog while seven wizards box near old quiet jetty " * 30
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer([text + more], 320))
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path / "plan.yaml"


def start(plan: Path, out: Path, *more: str) -> "subprocess.Popen[str]":
    folder = plan.parent
    sets = ["--set", f"data.path={folder / 'corpus.txt'}", "--set", f"tokenizer.path={folder / 'tokenizer.model'}"]
    command = [sys.executable, "-m", "tnllm", "sweep", str(plan), "--out", str(out), *sets, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def results(out: Path) -> list[tuple[object, ...]]:
    keys = ("cell", "overrides", "status", "steps", "tokens", "val_loss", "val_bpb", "train_loss")
    return [tuple(row[key] for key in keys) for row in read_csv(out / "results.csv")]


def test_plan_expands(sweep: Path) -> None:
    plan = read_plan(sweep)
    rate = plan.cells(plan.groups["rate"], [])
    assert rate is not None
    assert [cell.name for cell in rate] == ["rate/learning_rate=0.001,seed=0", "rate/learning_rate=0.01,seed=0"]
    assert plan.cells(plan.groups["seeds"], []) is None
    rows = [
        {"cell": cell.name, "status": "done", "val_loss": loss} for cell, loss in zip(rate, (3.0, 2.0), strict=True)
    ]
    seeds = plan.cells(plan.groups["seeds"], rows)
    assert seeds is not None
    assert [cell.sets() for cell in seeds] == [
        ["optimizer.learning_rate=0.01", f"train.seed={seed}"] for seed in (1, 2)
    ]
    change = plan.cells(plan.groups["change"], rows)
    assert change is not None and change[1].choice == "gate=none,glu_dim=56"
    rows[1]["status"] = "failed: it diverged"
    assert plan.cells(plan.groups["seeds"], rows)[0].overrides["optimizer.learning_rate"] == "0.001"  # type: ignore[index]
    rows[0]["status"] = "failed: it diverged"
    # Where every rate failed there is no best one: the groups after it have no cells, and the others run.
    assert plan.cells(plan.groups["seeds"], rows) == []


@pytest.mark.parametrize("name", ["loss", "hybrid", "cleaning", "recall"])
def test_the_sweeps_of_the_evidence_can_be_read(name: str) -> None:
    plan = read_plan(Path(f"recipes/evidence/{name}.yaml"))
    assert plan.charts and all(plan.examples(group) for group in plan.groups.values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("groups:", "group:", "needs groups"),
        ("    recipe: small", "    recipes: small", "recipes is not a key here"),
        ("    recipe: small\n", "", "give a recipe, or best_of"),
        ("recipe: small", "recipe: smal", "no recipe smal"),
        ("best_of: [rate]\n    seeds", "best_of: [rates]\n    seeds", "rates, no group above it; did you mean 'rate'"),
        ("seeds: [1, 2]", "seeds: [1, x]", "expected whole numbers"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "is there twice"),
        ("[1e-3, 1e-2]", "1e-3", "expected a list"),
        ("optimizer.learning_rate: [", "optimizer.learning_rat: [", "did you mean 'optimizer.learning_rate'"),
        ("model.position: decay", "model.position: decoy", "model.position"),
        ("groups: [rate, seeds]}", "groups: [rate, seed]}", "seed is not a group"),
    ],
)
def test_bad_files_are_told_in_one_line(sweep: Path, old: str, new: str, message: str) -> None:
    assert old in PLAN
    sweep.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as error:
        read_plan(sweep)
    assert "\n" not in str(error.value) and str(sweep) in str(error.value)


@pytest.mark.slow
def test_a_kill_changes_nothing_in_the_table(sweep: Path, tmp_path: Path) -> None:
    sweep.write_text(
        PLAN.partition("  change:")[0].replace("[1, 2]", "[0, 1]") + "charts:\n  rates: {groups: [rate]}\n"
    )
    calm = start(sweep, tmp_path / "calm", "--jobs", "2")
    shown, log = calm.communicate(timeout=600)
    assert calm.returncode == 0, log
    assert "4 cells ran, 0 are open" in shown
    assert (tmp_path / "calm" / "rates.png").stat().st_size > 1000

    out = tmp_path / "killed"
    killed = start(sweep, out)
    deadline = time.monotonic() + 300
    while not any((out / "cells").glob("*/*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(read_rows(out)) < 4
    stopped = start(sweep, out, "--limit-minutes", "0.05")
    _, log = stopped.communicate(timeout=300)
    assert "run the same command again to continue" in log
    again = start(sweep, out, "--jobs", "2")
    _, log = again.communicate(timeout=600)
    assert again.returncode == 0, log
    assert results(out) == results(tmp_path / "calm")
    assert (out / "curves.csv").read_text() == (tmp_path / "calm" / "curves.csv").read_text()
    assert [line.spread is not None for line in summarize(read_csv(out / "results.csv"))].count(True) == 1


@pytest.mark.parametrize(("name", "folder"), [("loss", ""), ("hybrid", "hybrid"), ("recall", "recall")])
def test_cells_that_ran_elsewhere_are_taken_over(name: str, folder: str, tmp_path: Path) -> None:
    """As they stand in the committed tables, which the ones written here equal but for validations of unfinished cells."""
    known = Path("docs/evidence") / folder
    plan = read_plan(Path(f"recipes/evidence/{name}.yaml"))
    assert not run_sweep(plan, tmp_path, jobs=1, limit_s=0, known=known)
    for table in (RESULTS, CURVES):
        old, new = (sorted(read_csv(place / table), key=str) for place in (known, tmp_path))
        assert new == [row for row in old if row.get("finished") != "False"]
    # What ran here comes first.
    cell = next((tmp_path / "cells").glob("*/*/cell.json"))
    cell.write_text(cell.read_text().replace('"status": "done"', '"status": "failed: here"'))
    run_sweep(plan, tmp_path, jobs=1, limit_s=0, known=known)
    assert [row["status"] for row in read_rows(tmp_path)].count("failed: here") == 1


@pytest.mark.slow
def test_a_failed_cell_is_named_and_the_rest_runs(sweep: Path, tmp_path: Path) -> None:
    groups = PLAN.partition("  change:")[0].replace("[1e-3, 1e-2]", "[1e30]")
    sweep.write_text(f"{groups}  last:\n    recipe: small\n    grid: {{optimizer.learning_rate: [1e-3]}}\n")
    done = start(sweep, tmp_path / "out")
    shown, log = done.communicate(timeout=600)
    assert done.returncode == 1 and "1 cells failed" in log.splitlines()[-1]
    assert "rate/learning_rate=1e+30,seed=0: failed: " in shown
    assert "seeds: nothing to start from, every cell of rate failed" in shown and "2 cells ran, 0 are open" in shown
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert {row["group"]: row["status"].partition(":")[0] for row in rows} == {"rate": "failed", "last": "done"}


def test_power_law_is_fitted() -> None:
    a, b = power_law([(size, 20.0 * size**-0.1) for size in (5e6, 15e6, 42e6)])
    assert abs(a - 20.0) < 1e-9 and abs(b - 0.1) < 1e-12


def test_accuracy_by_pairs_is_kept_and_drawn(tmp_path: Path) -> None:
    check = {"val_accuracy": 0.75, "val_accuracy_by_pairs": {"4": 1.0, "16": 0.5}}
    cells = [
        {"cell": f"{group}/x", "group": group, "choice": "x", "recipe": "r", "status": "done", "tokens": 9}
        | {"val_loss": 1.0, "val_bpb": 1.0, "tokens_per_s": 1, **_accuracies(row)}
        for group, row in (("a", check), ("b", {}))
    ]
    write_csv(tmp_path / "results.csv", cells)
    rows = read_csv(tmp_path / "results.csv")
    assert [row["accuracy_16"] for row in rows] == [0.5, None] and rows[1]["val_accuracy"] is None
    assert [line.accuracies for line in summarize(rows)] == [[0.75], []]
    chart = Chart("pairs", "pairs", "pairs", ["a", "b"])
    assert draw(chart, rows, []) is not None
    assert draw(chart, rows[1:], []) is None


def test_charts_of_sizes_and_repeats() -> None:
    rows = [
        {"cell": f"g/{kind}{size}", "group": "g", "kind": kind, "recipe": f"{kind}{size}", "status": "done"}
        | {"parameters_without_embedding": size, "val_loss": loss}
        for kind, size, loss in (("transnormer", 5, 3.5), ("transnormer", 15, 3.3), ("transformer", 5, 3.4))
    ]
    repeats = [{"cell": "g/transnormer5", "repeat": name, "val_loss": 3.0} for name in ("new", "1-15")]
    sizes = draw(Chart("sizes", "sizes", "parameters", ["g"]), rows, [])
    distances = draw(Chart("repeats", "repeats", "repeats", ["g"]), rows, [], repeats)
    assert sizes is not None and distances is not None and sizes != distances
    assert draw(Chart("repeats", "repeats", "repeats", ["g"]), rows, [], []) is None
