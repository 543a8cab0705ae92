"""Loss spikes and profiles."""

import gzip
import json
import random

import pytest
import torch

from tnllm.modeling.weights import load_model
from tnllm.training.checkpoint import read_state
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.loss_spikes import Spike, SpikeDetector, SpikeGuard
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


def test_a_guard_decides_as_the_detector_and_by_the_norm_too():
    guard, draw = SpikeGuard(torch.device("cpu")), random.Random(0)
    for _ in range(200):
        assert not guard(torch.tensor(3.0 + draw.gauss(0, 0.1)), torch.tensor(1.0 + draw.gauss(0, 0.05)))
    before = guard.window.clone()
    assert guard(torch.tensor(4.2), torch.tensor(1.0)) and guard(torch.tensor(3.0), torch.tensor(2.5))
    assert not guard(torch.tensor(float("nan")), torch.tensor(1.0)) and torch.equal(guard.window, before)
    again = SpikeGuard(torch.device("cpu"))
    again.load(guard.to_lists())
    assert torch.equal(again.window, before)
    few = SpikeGuard(torch.device("cpu"))
    assert not any(few(torch.tensor(1.0), torch.tensor(1.0)) for _ in range(31)) and not few(
        torch.tensor(99.0), torch.tensor(1.0)
    )


@pytest.mark.slow
def test_a_spike_is_skipped_and_a_resume_knows_it(recipe, tmp_path, monkeypatch, capfd):
    import tnllm.training.run as run

    make = run.make_trainer

    def spiky(*args):
        trainer = make(*args)
        true = trainer.loss_sum

        def loss_sum(batch):
            # Global samples 272 to 279: the update of step 35.
            wild = torch.equal(batch.tokens, trainer.loader.batch(272, 4).tokens)
            return true(batch) * (50 if wild else 1)

        trainer.loss_sum = loss_sum
        return trainer

    monkeypatch.setattr(run, "make_trainer", spiky)
    sets = ["train.spikes=skip", "eval.every_steps=0", "schedule.horizon_steps=40", "checkpoint.every_steps=1"]
    sets += ["checkpoint.keep=40", "log.every_steps=7"]
    train(load_recipe(str(recipe), [*sets, "train.max_steps=40"]), tmp_path / "run")
    shown = capfd.readouterr().err
    assert "loss spike at step 35: " in shown and "(global samples 272 to 279); the update was skipped" in shown
    before, after = (load_model(tmp_path / f"run/checkpoints/step-000000{step}") for step in (34, 35))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    train(load_recipe(str(recipe), [*sets, "train.max_steps=33"]), tmp_path / "parts")
    train(load_recipe(str(recipe), [*sets, "train.max_steps=40"]), tmp_path / "parts", resume="auto")
    ends = [read_state(tmp_path / name / "checkpoints/step-00000040") for name in ("run", "parts")]
    assert ends[0] == ends[1] and ends[0].skipped == 1 and len(ends[0].guard[0]) == 39
