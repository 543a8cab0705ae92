"""Training runs: learning, exact resuming, signals, full disks, non-finite losses."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.sections import loaders_of
from tnllm.errors import MissingExtra, RunError, Terminated, UserError
from tnllm.modeling.weights import load_model
from tnllm.tokenizer import train_tokenizer
from tnllm.training.checkpoint import TrainState, list_checkpoints
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.metrics import read_metrics
from tnllm.training.run import Run
from tnllm.training.signals import StopSignals
from tnllm.training.trainer import make_trainer, train_step

TIMES = ("time", "tokens_per_s", "mem_gib", "data_wait_s")
ROOT = Path(__file__).parents[2]


def rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_learns_and_leaves_a_model(config, tmp_path, capfd):
    train(config, tmp_path / "run")
    metrics = rows(tmp_path / "run")
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[0] == pytest.approx(math.log(320), rel=0.05)
    assert losses[-1] < losses[0] - 1
    validated = [row for row in metrics if "val_loss" in row]
    assert [row["step"] for row in validated] == [10, 20]
    assert validated[1]["val_loss"] < validated[0]["val_loss"]
    assert 0 < validated[1]["val_bpb"] < 8
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        "checkpoints",
        "config.resolved.yaml",
        "env.json",
        "latest",
        "metrics.jsonl",
        "train.log",
        "weights",
    ]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000015", "step-00000020"]
    published = load_model(tmp_path / "run")
    checkpointed = load_model(tmp_path / "run" / "checkpoints" / "step-00000020")
    for a, b in zip(published.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert load_recipe(str(tmp_path / "run/config.resolved.yaml")) == config
    seen = capfd.readouterr()
    assert seen.out == ""
    assert "step 20/20  loss" in seen.err and "val_bpb" in seen.err


@pytest.mark.slow
def test_the_loss_curve_is_bit_equal_at_a_seed(config, tmp_path):
    train(config, tmp_path / "a")
    train(config, tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.slow
def test_ten_and_ten_more_equal_twenty(recipe, config, tmp_path):
    train(config, tmp_path / "uninterrupted")
    train(load_recipe(str(recipe), ["train.max_steps=10"]), tmp_path / "parts")
    train(config, tmp_path / "parts", resume="auto")
    straight = [row for row in rows(tmp_path / "uninterrupted") if "loss" in row]
    resumed = [row for row in rows(tmp_path / "parts") if "loss" in row]
    assert straight == resumed


@pytest.mark.slow
def test_epochs_end_a_run_and_resume_exactly(recipe, tmp_path, capfd):
    epochs = [
        "train.max_epochs=0.2",
        "train.max_steps=null",
        "schedule.horizon_steps=null",
        "schedule.warmup_steps=null",
    ]
    config = load_recipe(str(recipe), epochs)
    loader, _ = loaders_of(config)
    steps = math.ceil(0.2 * loader.num_rows / 8)
    train(config, tmp_path / "straight")
    assert [row["step"] for row in rows(tmp_path / "straight") if "loss" in row] == list(range(1, steps + 1))
    resolved = load_recipe(str(tmp_path / "straight/config.resolved.yaml"))
    assert (resolved.total_steps, resolved.schedule.horizon_steps, resolved.schedule.warmup_steps) == (steps, steps, 0)
    assert "ends the run" not in capfd.readouterr().err
    train(load_recipe(str(recipe), [*epochs, "schedule.horizon_epochs=0.2", "train.max_steps=3"]), tmp_path / "parts")
    assert f"train.max_steps ends the run at step 3, before train.max_epochs at step {steps}" in capfd.readouterr().err
    train(config, tmp_path / "parts", resume="auto")
    assert [row for row in rows(tmp_path / "parts") if "loss" in row] == [
        row for row in rows(tmp_path / "straight") if "loss" in row
    ]


def test_plans_know_the_epochs(recipe, capsys):
    """Of text that is not tokenized yet, they go by its size: four bytes a token."""
    from tnllm.training.dry_run import check_recipe, dry_run_text

    sets = ["train.max_epochs=2", "train.max_steps=null", "schedule.horizon_steps=null"]
    tokens = Path(load_recipe(str(recipe)).data.path[0].path).stat().st_size / 4
    steps = math.ceil(2 * tokens / 256)
    assert check_recipe(str(recipe), sets).steps == steps
    assert f"run     about {steps} steps, " in dry_run_text(load_recipe(str(recipe), sets))
    both = dry_run_text(load_recipe(str(recipe), [*sets, "train.max_steps=5"]))
    assert f"ends    train.max_steps ends the run at step 5, before train.max_epochs at step {steps}\n" in both
    with pytest.raises(UserError, match=r"train\.max_epochs is 2, and the size of the data is unknown"):
        dry_run_text(load_recipe(str(recipe), [*sets, "data.path=https://example.org/corpus.jsonl"]))
    remote = load_recipe(str(recipe), ["train.max_epochs=2", "data.path=https://example.org/corpus.jsonl"])
    assert "run     about 20 steps, " in dry_run_text(remote)


def test_accumulation_equals_one_large_batch(recipe):
    def gradients(micro: int) -> list[torch.Tensor]:
        config = load_recipe(str(recipe), [f"train.micro_batch_size={micro}", "optimizer.grad_clip=0"])
        loader, _ = loaders_of(config)
        trainer = make_trainer(config, loader, torch.device("cpu"))
        total = 0
        batches = [loader.batch(first, micro) for first in range(0, 8, micro)]
        total = sum(batch.num_labels for batch in batches)
        for batch in batches:
            (trainer.loss_sum(batch) / total).backward()
        return [parameter.grad for parameter in trainer.model.parameters()]

    for one, many in zip(gradients(8), gradients(2), strict=True):
        # The same sums of 256 fp32 terms in another order.
        torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


def test_a_finished_run_is_not_overwritten(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds a run already; add --resume auto"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["model.vocab_size=300"], "has 320 pieces, more than model.vocab_size 300"),
        (["data.path=/no/such/file"], "/no/such/file"),
        (["tokenizer.path=/no/such/file"], "/no/such/file"),
        (["train.device=cuda"], "train.device is 'cuda', but torch sees 0 CUDA devices here; allowed: auto, cpu"),
    ],
)
def test_bad_input_is_one_line(recipe, tmp_path, sets, message):
    if "cuda" in sets[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError) as error:
        train(load_recipe(str(recipe), sets), tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_an_empty_corpus_is_named(recipe, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="the corpus is empty"):
        train(load_recipe(str(recipe), [f"data.path={tmp_path / 'empty.txt'}"]), tmp_path / "run")


def test_a_resumed_run_keeps_its_model(recipe, config, tmp_path):
    train(load_recipe(str(recipe), ["train.max_steps=5"]), tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.glu_dim is 64, but step-00000005 was trained with 48"):
        train(load_recipe(str(recipe), ["model.glu_dim=64"]), tmp_path / "run", resume="auto")


def test_a_resumed_run_keeps_its_tokenizer(recipe, corpus, config, tmp_path):
    train(load_recipe(str(recipe), ["train.max_steps=5"]), tmp_path / "run")
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer([corpus[0].read_text() + "0123456789" * 9], vocab_size=320))
    with pytest.raises(UserError, match="is not the tokenizer this run was trained with"):
        train(load_recipe(str(recipe), [f"tokenizer.path={other}"]), tmp_path / "run", resume="auto")


def test_tensorboard_events_beside_the_metrics(recipe, tmp_path, monkeypatch):
    sets = ["train.max_steps=2", "log.tensorboard=true", "eval.every_steps=0"]
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(MissingExtra, match=r"pip install 'tnllm\[track\]'"):
            train(load_recipe(str(recipe), sets), tmp_path / "run")
    else:
        train(load_recipe(str(recipe), sets), tmp_path / "run")
        assert list((tmp_path / "run/tensorboard").glob("events.*"))


def poison(trainer, at: int) -> None:
    """Make the loss of update `at` NaN."""
    true, count = trainer.loss_sum, [0]

    def loss_sum(batch):
        count[0] += 1
        loss = true(batch)
        return loss * float("nan") if count[0] == at else loss

    trainer.loss_sum = loss_sum


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_nan_never_reaches_the_weights(recipe, tmp_path, monkeypatch, policy):
    import tnllm.training.run as run

    make = run.make_trainer

    def poisoned(*args):
        trainer = make(*args)
        poison(trainer, at=2 * 7)  # two micro-batches a step
        return trainer

    monkeypatch.setattr(run, "make_trainer", poisoned)
    config = load_recipe(str(recipe), [f"train.nonfinite={policy}", "eval.every_steps=0", "log.every_steps=3"])
    if policy == "stop":
        with pytest.raises(RunError, match=r"step 7: loss nan.*global samples 48 to 55.*was refused"):
            train(config, tmp_path / "run")
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000005"]
    else:
        train(config, tmp_path / "run")
        assert rows(tmp_path / "run")[-2]["skipped"] == 1
    report = json.loads((tmp_path / "run/nonfinite.jsonl").read_text())
    assert report == {"step": 7, "samples": [48, 55], "loss": "nan", "grad_norm": "nan"}
    assert all(torch.isfinite(p).all() for p in load_model(tmp_path / "run").parameters())


def test_a_refused_update_changes_nothing(config):
    loader, _ = loaders_of(config)
    trainer = make_trainer(config, loader, torch.device("cpu"))
    poison(trainer, at=3)
    state = TrainState()
    assert train_step(trainer, state, StopSignals())
    before = [p.clone() for p in trainer.model.parameters()]
    moments = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]
    assert train_step(trainer, state, StopSignals())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, trainer.optimizer.state.values(), strict=True))


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_saves_and_leaves(recipe, tmp_path, monkeypatch, number, error):
    import tnllm.training.loop as loop

    true = loop.train_step

    def step(trainer, state, signals):
        update = true(trainer, state, signals)
        if state.step == 3:
            os.kill(os.getpid(), number)
        return update

    monkeypatch.setattr(loop, "train_step", step)
    with pytest.raises(error):
        train(load_recipe(str(recipe)), tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000003"]
    assert rows(tmp_path / "run")[-1]["step"] == 3
    assert signal.getsignal(number) is not None


def test_a_signal_within_a_step_gives_the_step_up(config):
    loader, _ = loaders_of(config)
    trainer = make_trainer(config, loader, torch.device("cpu"))
    before = [p.clone() for p in trainer.model.parameters()]
    signals, state, true = StopSignals(), TrainState(), trainer.loss_sum

    def loss_sum(batch):
        signals.stop = signal.SIGTERM
        return true(batch)

    trainer.loss_sum = loss_sum
    assert train_step(trainer, state, signals) is None
    assert state == TrainState()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert signals.stop == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_end(recipe, config, tmp_path):
    """SIGKILL in a row of processes, at moments that fall before, into and after checkpoint writes."""
    train(config, tmp_path / "straight")
    command = [sys.executable, "-m", "tnllm", "train", str(recipe), "--out", str(tmp_path / "killed")]
    command += ["--set", "checkpoint.every_steps=1", "--resume", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kills = 0
    for wait in (0.0, 0.013, 0.031, 0.047):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            # The first step line after the start: from here on checkpoints are being written.
            if line.startswith("step"):
                break
        time.sleep(wait)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
    # On a busy machine a process may have finished first.
    assert kills > 0
    train(config, tmp_path / "killed", resume="auto")
    straight = [row for row in rows(tmp_path / "straight") if "loss" in row]
    resumed = [row for row in rows(tmp_path / "killed") if "loss" in row]
    assert straight == resumed
    assert not list((tmp_path / "killed/checkpoints").glob("*.tmp-*"))


def test_a_run_ends_after_max_time_and_continues(recipe, tmp_path, capfd, monkeypatch):
    """The timer goes off after three updates, however fast they are."""
    add, left = Run.add, []

    def ring(run, update):
        add(run, update)
        if update.step % 3 == 0:
            left.append(signal.getitimer(signal.ITIMER_REAL)[0])
            signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(Run, "add", ring)
    sets = ["train.max_steps=7", "train.max_time=9h", "checkpoint.every_steps=0", "eval.every_steps=0"]
    for step in (3, 6):
        train(load_recipe(str(recipe), sets), tmp_path / "run", resume="auto")
        assert f"stopped by train.max_time after step {step}, saved at step {step};" in capfd.readouterr().err
        assert list_checkpoints(tmp_path / "run")[-1].name == f"step-0000000{step}"
        assert not (tmp_path / "run/weights").exists()
        assert 0 < left.pop() <= 9 * 3600 and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    train(load_recipe(str(recipe), sets), tmp_path / "run", resume="auto")
    assert (tmp_path / "run/weights").exists()


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("30m", 1800), ("1d2h3m4s", 93784), ("1.5", 1.5)])
def test_max_time_is_read(recipe, text, seconds):
    assert load_recipe(str(recipe), [f"train.max_time={text}"]).train.max_time == seconds


@pytest.mark.parametrize("text", ["0", "-1", "soon", "1h30", "1e9", "''"])
def test_no_max_time(recipe, text):
    with pytest.raises(UserError, match=r"train.max_time is .*"):
        load_recipe(str(recipe), [f"train.max_time={text}"])
