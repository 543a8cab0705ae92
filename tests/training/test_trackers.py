"""Weights & Biases, trackio and TensorBoard as views of metrics.jsonl, by stand-ins that write down their calls."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tnllm.cli.main import main
from tnllm.errors import MissingExtra, Terminated
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.metrics import read_metrics
from tnllm.training.sections import LogSection
from tnllm.training.trackers import Trackers

STAND_IN = """
import json, os, pathlib
CALLS = pathlib.Path(os.environ["CALLS"])

def call(what, **values):
    if os.environ.get("FAIL") == what:
        print("on standard output")
        raise OSError("no route to host\\nsecond line")
    with open(CALLS, "a") as file:
        file.write(json.dumps({"what": what, "package": __name__, **values}) + "\\n")

class Settings:
    def __init__(self, **values):
        assert values == {"console": "off"}

class Run:
    def log(self, values, step):
        call("log", values=values, step=step)

    def finish(self, exit_code=None):
        call("finish", exit_code=exit_code)

def init(settings=None, **values):
    print("on standard output")
    call("init", **values)
    return Run()

def finish():
    call("finish")
"""
SETS = [
    "log.wandb=true", "log.trackio=true", "train.max_steps=4", "eval.every_steps=2", "checkpoint.every_steps=2",
]  # fmt: skip


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What the stand-ins of wandb and trackio were called with so far."""
    for name in ("wandb", "trackio"):
        (tmp_path / f"packages/{name}").mkdir(parents=True)
        (tmp_path / f"packages/{name}/__init__.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.jsonl"))
    yield lambda: [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def logged(calls: list[dict], package: str) -> list[tuple[int, dict]]:
    return [(call["step"], call["values"]) for call in calls if call["what"] == "log" and call["package"] == package]


def rows(out: Path) -> list[tuple[int, dict]]:
    kept = [
        {key: value for key, value in row.items() if value is not None} for row in read_metrics(out / "metrics.jsonl")
    ]
    return [(row.pop("step"), {key: value for key, value in row.items() if key != "time"}) for row in kept]


def test_rows_arrive_with_their_names_and_steps_and_a_resume_continues_the_run(recipe, tmp_path, calls, capfd):
    out = tmp_path / "run"
    train(load_recipe(str(recipe), SETS), out)
    train(load_recipe(str(recipe), [*SETS, "train.max_steps=6"]), out, resume="auto")
    seen = calls()
    identity = json.loads((out / "tracking.json").read_text())["id"]
    for package in ("wandb", "trackio"):
        assert logged(seen, package) == rows(out)
        starts = [call for call in seen if call["what"] == "init" and call["package"] == package]
        assert [start["name"] for start in starts] == [f"run-{identity}"] * 2
        assert starts[0]["resume"] == "allow" and starts[0]["project"] == "tnllm"
        assert [start["config"]["train"]["max_steps"] for start in starts] == [4, 6]
    assert [call["id"] for call in seen if call["what"] == "init" and "id" in call] == [identity] * 2
    assert [call["exit_code"] for call in seen if call["what"] == "finish" and call["package"] == "wandb"] == [0, 0]
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_one_of_two_ranks_writes(recipe, tmp_path, calls):
    """As typed: each row once, whichever process computed what."""
    command = [sys.executable, "-m", "tnllm", "train", str(recipe), "--nproc", "2", "--out", str(tmp_path / "run")]
    command += [part for item in SETS for part in ("--set", item)]
    path = os.pathsep.join([str(tmp_path / "packages"), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for package in ("wandb", "trackio"):
        assert logged(calls(), package) == rows(tmp_path / "run")
        assert [call["what"] for call in calls() if call["package"] == package].count("init") == 1


def test_a_tracker_switched_on_later_gets_the_rows_before(recipe, tmp_path, calls):
    train(load_recipe(str(recipe), [*SETS, "log.wandb=false"]), tmp_path / "run")
    train(load_recipe(str(recipe), [*SETS, "train.max_steps=6"]), tmp_path / "run", resume="auto")
    assert logged(calls(), "wandb") == logged(calls(), "trackio") == rows(tmp_path / "run")


def test_another_history_is_another_run_there(recipe, tmp_path, calls):
    out = tmp_path / "run"
    train(load_recipe(str(recipe), SETS), out)
    first, before = json.loads((out / "tracking.json").read_text())["id"], len(calls())
    train(load_recipe(str(recipe), [*SETS, "train.max_steps=3"]), out, resume=str(out / "checkpoints/step-00000002"))
    second = json.loads((out / "tracking.json").read_text())["id"]
    assert second != first
    assert json.loads((out / "abandoned/after-step-00000002/tracking.json").read_text())["id"] == first
    assert logged(calls()[before:], "wandb") == rows(out)


def test_a_tracker_that_fails_costs_a_line(recipe, tmp_path, calls, capfd, monkeypatch):
    monkeypatch.setenv("FAIL", "log")
    train(load_recipe(str(recipe), SETS), tmp_path / "run")
    seen = capfd.readouterr()
    assert seen.out == "" and (tmp_path / "run/weights").is_dir()
    for name in ("wandb", "trackio"):
        assert seen.err.count(f"log.{name} failed (OSError: no route to host); the run continues without it") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("fail", ["init", "finish"])
def test_it_may_also_fail_at_the_start_and_at_the_end(tmp_path, calls, monkeypatch, fail):
    monkeypatch.setenv("FAIL", fail)
    lines: list[str] = []
    with Trackers(tmp_path, LogSection(wandb=True), {}, 0, lines.append) as trackers:
        trackers.write({"step": 1, "loss": 2.0, "time": 0.0})
    assert lines == ["log.wandb failed (OSError: no route to host); the run continues without it"]


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"id": 3, "trackers": 4}', '{"id": "../../x", "trackers": []}', "\0"]
)
def test_a_damaged_identity_is_replaced(tmp_path, calls, damage):
    (tmp_path / "tracking.json").write_text(damage)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5, "mfu": null, "time": 0.0}\n')
    with Trackers(tmp_path, LogSection(trackio=True), {}, 3, print):
        assert logged(calls(), "trackio") == [(3, {"loss": 1.5})]
    assert json.loads((tmp_path / "tracking.json").read_text())["trackers"] == ["trackio"]


def test_the_outcome_is_told(recipe, tmp_path, calls, monkeypatch):
    """A stop after a signal is no failure; an error is one."""
    config = load_recipe(str(recipe), SETS)
    monkeypatch.setattr("tnllm.training.hooks._validate", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        train(config, tmp_path / "stopped")
    monkeypatch.setattr("tnllm.training.hooks._validate", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "failed")
    codes = [call["exit_code"] for call in calls() if call["what"] == "finish" and call["package"] == "wandb"]
    assert codes == [0, 1]


@pytest.mark.parametrize(("key", "extra"), [("wandb", "wandb"), ("trackio", "trackio"), ("tensorboard", "track")])
def test_a_missing_package_is_named_before_any_work(recipe, tmp_path, monkeypatch, capsys, key, extra):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == key else find(name, *more))
    message = f"this needs {key}, which is not installed; run: pip install 'tnllm[{extra}]'"
    with pytest.raises(MissingExtra) as error:
        train(load_recipe(str(recipe), [f"log.{key}=true"]), tmp_path / "run")
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "home").exists()  # nothing was tokenized
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "check", str(recipe), "--set", f"log.{key}=true"])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("project", ["", "a/b", "-x", "a b", "x" * 129, "null", "3"])
def test_names_of_projects(recipe, project):
    from tnllm.errors import UserError

    with pytest.raises(UserError, match=r"^log\.project is .* \(--set\)$"):
        load_recipe(str(recipe), [f"log.project={project}"])
