"""Training on text that is tokenized while it is read: a run that was killed takes the same steps."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.sections import loaders_of
from tnllm.errors import UserError
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.metrics import read_metrics

# Chunks of 20 rows, two and a half steps of 8.
STREAM = "data.stream_gb=0.00001024"
ROOT = Path(__file__).parents[2]
# Ends after step 8; the last checkpoint is of step 5.
KILLED = """
import os, sys
from pathlib import Path
from tnllm.training import loop
from tnllm.training.config import load_recipe

def step(trainer, state, signals, real=loop.train_step):
    if state.step == 8:
        os.kill(os.getpid(), 9)
    return real(trainer, state, signals)

loop.train_step = step
loop.train(load_recipe(sys.argv[1], [sys.argv[2]]), Path(sys.argv[3]))
"""


def losses(run: Path) -> list[dict]:
    kept = ("step", "loss", "val_loss", "grad_norm")
    return [{key: row[key] for key in kept if key in row} for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
def test_a_killed_run_takes_the_same_steps(recipe, tmp_path):
    train(load_recipe(str(recipe), [STREAM]), tmp_path / "whole")
    assert any("val_loss" in row for row in losses(tmp_path / "whole"))
    command = [sys.executable, "-c", KILLED, str(recipe), STREAM, str(tmp_path / "run")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    # The checkpoint alone is enough: what was tokenized is lost too.
    shutil.rmtree(tmp_path / "run/stream")
    train(load_recipe(str(recipe), [STREAM]), tmp_path / "run", resume="auto")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_source_that_changed_is_refused_on_resume(recipe, corpus, tmp_path):
    text = tmp_path / "text.jsonl"
    shutil.copyfile(corpus[0], text)
    sets = [STREAM, f"data.path={text}"]
    train(load_recipe(str(recipe), [*sets, "train.max_steps=5"]), tmp_path / "run")
    with open(text, "a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"was made with another content of .*text.jsonl"):
        train(load_recipe(str(recipe), sets), tmp_path / "run", resume="auto")
    shutil.rmtree(tmp_path / "run/stream")
    with pytest.raises(UserError, match=r"changed since step-00000005: .*the content of data.path"):
        train(load_recipe(str(recipe), sets), tmp_path / "run", resume="auto")


def test_what_does_not_go_together_is_said(recipe):
    with pytest.raises(UserError, match=r"stream_gb is for format text"):
        load_recipe(str(recipe), [STREAM, "data.format=chat"])
    config = load_recipe(str(recipe), [STREAM])
    with pytest.raises(UserError, match=r"data.stream_gb is for tnllm train"):
        loaders_of(config)
