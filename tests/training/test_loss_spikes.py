"""Loss spikes and profiles."""

import gzip
import json
import random

import pytest
import torch

from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.loss_spikes import Spike, SpikeDetector
from tnllm.training.profile import Profile


def test_noise_is_no_spike_and_a_jump_is():
    draw = random.Random(0)
    detector = SpikeDetector()
    for step in range(2000):
        assert detector.check(step, 3.0 + draw.gauss(0, 0.1)) is None
    spike = detector.check(2000, 4.2)
    assert spike is not None and abs(spike.usual - 3.0) < 0.05
    assert detector.check(2001, 4.2) is not None and detector.check(2002, 3.0) is None


def test_a_falling_loss_and_a_flat_one_have_none():
    for loss in (lambda step: 9.0 * 0.98**step + 2, lambda step: 0.001 * (1 + 0.01 * (step % 7))):
        detector = SpikeDetector()
        assert [detector.check(step, loss(step)) for step in range(300)] == [None] * 300


def test_a_few_losses_are_not_judged():
    detector = SpikeDetector()
    assert [detector.check(step, 1.0) for step in range(32)] == [None] * 32
    assert detector.check(32, 100.0) == Spike(32, 100.0, 1.0)


def test_a_run_reports_its_spikes(recipe, tmp_path, monkeypatch, capfd):
    import tnllm.training.run as run

    class Jumpy(SpikeDetector):
        def check(self, step, loss):
            return Spike(step, loss, 1.5) if step == 7 else None

    monkeypatch.setattr(run, "SpikeDetector", Jumpy)
    train(load_recipe(str(recipe), ["train.max_steps=8", "log.every_steps=4"]), tmp_path / "run")
    rows = list(map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()))
    [spike] = [row for row in rows if "spike_loss" in row]
    assert (spike["step"], spike["tokens"], spike["first_sample"], spike["last_sample"]) == (7, 7 * 256, 48, 55)
    assert "loss spike at step 7: " in (shown := capfd.readouterr().err) and "(global samples 48 to 55)" in shown


@pytest.mark.slow
def test_a_run_can_be_profiled(recipe, tmp_path, capfd):
    sets = ["train.max_steps=5", "log.profile_steps=1", "eval.every_steps=0"]
    train(load_recipe(str(recipe), sets), tmp_path / "run")
    folder = tmp_path / "run/profile"
    assert f"profile of 1 steps in {folder}: trace.json.gz" in capfd.readouterr().err
    trace = json.loads(gzip.open(folder / "trace.json.gz").read())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    assert "aten::mm" in (folder / "operators.txt").read_text()


def test_a_run_too_short_to_profile_writes_nothing(tmp_path):
    profile = Profile(tmp_path / "profile", 2, torch.device("cpu"), print)
    profile.step()
    profile.close()
    assert not (tmp_path / "profile").exists()
