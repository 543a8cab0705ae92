"""A run folder has one writer and one history."""

import json
import os
import shutil
import signal

import pytest
import torch

from tnllm.errors import RunError, Terminated, UserError
from tnllm.files import only_writer
from tnllm.modeling.weights import resolve_model
from tnllm.training.checkpoint import find_checkpoint, list_checkpoints, read_state
from tnllm.training.config import load_recipe
from tnllm.training.loop import train
from tnllm.training.metrics import read_metrics

TIMES = ("time", "tokens_per_s", "mem_gib", "data_wait_s")
SHORT = ["checkpoint.every_steps=2", "checkpoint.keep=9", "eval.every_steps=4", "train.max_steps=8"]


def rows(run, *without):
    return [
        {k: v for k, v in row.items() if k not in (*TIMES, *without)} for row in read_metrics(run / "metrics.jsonl")
    ]


def steps(run):
    return [int(path.name[5:]) for path in list_checkpoints(run)]


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """An undisturbed run of eight steps; copied by `run`."""
    from tests.training.conftest import RECIPE

    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        path = folder / "small.yaml"
        path.write_text(RECIPE.replace("CORPUS", str(corpus[0])).replace("TOKENIZER", str(corpus[1])))
        train(load_recipe(str(path), SHORT), folder / "run")
    return folder / "run"


@pytest.fixture
def run(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def go(recipe, out, *sets, resume="auto", **how):
    train(load_recipe(str(recipe), [*SHORT, *sets]), out, resume=resume, **how)


def sums(run, step):
    """Size and SHA-256 of each file of a checkpoint."""
    return json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_bytes())


@pytest.mark.parametrize("stop", [None, 4], ids=["at once", "resumed"])
def test_a_recipe_gives_the_same_files_in_another_process(recipe, straight, tmp_path, stop):
    """Byte for byte, the random state included: a process seeds torch's generator from the system unless told."""
    torch.seed()
    if stop:
        go(recipe, tmp_path / "run", f"train.max_steps={stop}")
        torch.seed()
    go(recipe, tmp_path / "run")
    assert steps(tmp_path / "run") == [2, 4, 6, 8]
    for step in (2, 4, 6, 8):
        ours = sums(tmp_path / "run", step)
        # recipe.json has max_steps.
        differ = {name for name, entry in sums(straight, step).items() if ours.pop(name) != entry}
        assert differ <= ({"recipe.json"} if stop and step <= stop else set()) and not ours


def test_a_second_writer_is_refused(recipe, run):
    before = sorted(path.name for path in run.iterdir())
    with only_writer(run), pytest.raises(UserError, match=rf"{run} is being written by pid {os.getpid()} on"):
        go(recipe, run)
    assert sorted(path.name for path in run.iterdir()) == before


def test_an_earlier_step_is_a_new_history_that_auto_follows(recipe, run, straight, capfd):
    go(recipe, run, "train.max_steps=5", resume=str(run / "checkpoints/step-00000004"))
    target = run / "abandoned/after-step-00000004"
    assert f"2 later checkpoints and 5 rows of metrics.jsonl moved to {target}" in capfd.readouterr().err
    assert steps(run) == [2, 4, 5] and (run / "latest").read_text() == "step-00000005\n"
    assert {path.name for path in target.iterdir()} == {"step-00000006", "step-00000008", "metrics.jsonl", "weights"}
    assert [row["step"] for row in read_metrics(target / "metrics.jsonl")] == [5, 6, 7, 8, 8]
    go(recipe, run)
    assert "resumed from" in (text := capfd.readouterr().err) and "after step 5" in text
    assert [row for row in rows(run) if "loss" in row] == [row for row in rows(straight) if "loss" in row]


def test_an_abandoned_step_is_continued_in_a_new_folder_only(recipe, run, straight, tmp_path):
    """Into the run itself, its weights would follow the rows and checkpoints of the history that replaced it."""
    go(recipe, run, "optimizer.learning_rate=1e-3", resume=str(run / "checkpoints/step-00000004"))
    abandoned, before = run / "abandoned/after-step-00000004/step-00000006", rows(run)
    with pytest.raises(UserError, match=r"holds another history than --resume .*/step-00000006; choose another --out"):
        go(recipe, run, resume=str(abandoned))
    assert steps(run) == [2, 4, 6, 8] and rows(run) == before
    go(recipe, tmp_path / "new", resume=str(abandoned))
    assert sums(tmp_path / "new", 8) == sums(straight, 8)


def test_going_back_survives_a_kill(recipe, run):
    (run / "rolling-back").write_text("step-00000004")  # as a process leaves it that dies while it moves
    shutil.move(run / "checkpoints/step-00000008", run / "elsewhere")
    go(recipe, run, "train.max_steps=4")
    assert steps(run) == [2, 4] and not (run / "rolling-back").exists()


def test_another_run_is_continued_in_a_new_folder_only(recipe, run, straight, tmp_path):
    with pytest.raises(UserError, match=r"holds another history than --resume .*; choose another --out"):
        go(recipe, run, resume=str(straight))
    go(recipe, tmp_path / "new", "train.max_steps=10", resume=str(straight))
    assert steps(tmp_path / "new") == [8, 10] and steps(straight) == [2, 4, 6, 8]
    go(recipe, tmp_path / "same", resume=str(straight))  # finished: only published again
    assert steps(tmp_path / "same") == [8] and (tmp_path / "same/weights").is_dir()


def test_a_run_that_never_saved_starts_again(recipe, run, straight, capfd):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match=r"had saved \(step-00000008\) and has no checkpoint now"):
        go(recipe, run)
    (run / "latest").unlink()
    shutil.rmtree(run / "weights")
    go(recipe, run)
    target = run / "abandoned/after-step-00000000"
    assert f"10 rows of metrics.jsonl moved to {target}" in capfd.readouterr().err
    assert rows(run) == rows(straight) == rows(target)


def test_what_changed_is_said_and_the_former_config_kept(recipe, run, capfd):
    before = (run / "config.resolved.yaml").read_text()
    go(recipe, run, "train.max_steps=9", "optimizer.learning_rate=0.005")
    line = "changed since step-00000008: optimizer.learning_rate 0.01 -> 0.005, train.max_steps 8 -> 9"
    assert line in capfd.readouterr().err
    assert (run / "config.until-step-00000008.yaml").read_text() == before
    go(recipe, run, "train.max_steps=9", "optimizer.learning_rate=0.005")
    assert "changed since" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.seed", 3),
        ("data.seq_len", 64),
        ("data.packing", "concat"),
        ("data.val_fraction", 0.2),
        ("data.path", None),
    ],
)
def test_other_data_needs_a_flag(recipe, corpus, run, tmp_path, capfd, key, value):
    if key == "data.path":
        value = tmp_path / "other.jsonl"
        value.write_text("".join(corpus[0].read_text().splitlines(keepends=True)[:90]))
    change = (f"{key}={value}", "train.max_steps=9", "train.micro_batch_size=2")
    files = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=rf"changed since step-00000008: {key} .*add --allow-data-change"):
        go(recipe, run, *change)
    assert [path for path in sorted(run.rglob("*")) if path.name != "train.log"] == [
        path for path in files if path.name != "train.log"
    ]
    go(recipe, run, *change, allow_data_change=True)
    assert "reading starts at global sample 64, " in capfd.readouterr().err and steps(run)[-1] == 9


def test_the_same_data_elsewhere_is_no_change(recipe, corpus, run, tmp_path, capfd):
    shutil.copyfile(corpus[0], tmp_path / "moved.jsonl")
    go(recipe, run, f"data.path={tmp_path / 'moved.jsonl'}", "train.max_steps=9")
    assert "changed since step-00000008: data.path" in capfd.readouterr().err
    (tmp_path / "moved.jsonl").write_text(corpus[0].read_text()[:-1].replace("quick", "quiet"))
    with pytest.raises(UserError, match=r"the content of data.path; tokens would be learned twice"):
        go(recipe, run, f"data.path={tmp_path / 'moved.jsonl'}", "train.max_steps=10")


@pytest.mark.parametrize("at", [4, 8])
def test_what_a_signal_prevents_is_made_up_for(recipe, straight, tmp_path, monkeypatch, capfd, at):
    import tnllm.training.loop as loop

    true = loop.train_step

    def step(trainer, state, signals):
        update = true(trainer, state, signals)
        if state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return update

    monkeypatch.setattr(loop, "train_step", step)
    scores = {"score": lambda model, tokenizer: {"tasks/x/acc": 0.5}}
    with pytest.raises(Terminated):
        go(recipe, tmp_path / "run", "eval.sample_prompts=the", "eval.tasks_every_steps=4", resume=None, **scores)
    assert read_state(list_checkpoints(tmp_path / "run")[-1]).owed == ["validate", "sample", "score"]
    assert rows(tmp_path / "run")[-1]["step"] == at and "loss" in rows(tmp_path / "run")[-1]
    monkeypatch.setattr(loop, "train_step", true)
    capfd.readouterr()
    go(recipe, tmp_path / "run", "eval.sample_prompts=the", "eval.tasks_every_steps=4", **scores)
    assert f"sample at step {at}: the" in capfd.readouterr().err
    assert [row for row in rows(tmp_path / "run") if "tasks/x/acc" not in row] == rows(straight)
    assert [row["step"] for row in rows(tmp_path / "run") if "tasks/x/acc" in row] == [4, 8]


def test_an_end_before_the_checkpoint_publishes_nothing(recipe, run):
    shutil.rmtree(run / "weights")
    with pytest.raises(
        UserError, match=r"the run ends at step 5, and .*step-00000008 is beyond; raise train.max_steps"
    ):
        go(recipe, run, "train.max_steps=5")
    assert not (run / "weights").exists() and steps(run) == [2, 4, 6, 8]


BAD_STEPS = (b'{"step": "x"}', b'{"step": -1}', b'{"step": true}')


def test_a_damaged_row_costs_itself(recipe, run, straight, capfd):
    lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], b"\xff{", b"", b"[1]", *BAD_STEPS, *lines[2:]]))
    go(recipe, run, "train.max_steps=9")
    assert (
        "had 6 damaged or blank lines, which are left out; metrics.damaged.jsonl is as it was" in capfd.readouterr().err
    )
    assert rows(run)[:-2] == rows(straight)
    assert b"\xff{" in (run / "metrics.damaged.jsonl").read_bytes()


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"/etc/passwd": [1, "x"]}', '{"a": 1}', '{"a": [1e999, ""]}', "[" * 100_000, "\x00"]
)
def test_a_damaged_manifest_is_skipped(run, text):
    (run / "checkpoints/step-00000008/manifest.json").write_text(text)
    said: list[str] = []
    assert find_checkpoint(run, "auto", said.append) == run / "checkpoints/step-00000006"
    assert len(said) == 1 and "step-00000008 cannot be used" in said[0] and "is damaged" in said[0]


@pytest.mark.parametrize("data", [b"\xff\xfe\x00rubbish", b"", b"../../etc\n", b"step-00000001\x00"])
def test_a_damaged_latest_falls_back_to_the_folders(run, data):
    (run / "latest").write_bytes(data)
    said: list[str] = []
    assert find_checkpoint(run, str(run), said.append) == run / "checkpoints/step-00000008"
    assert said == [f"{run / 'latest'} is missing or damaged, trying the newest step folder"]
    shutil.rmtree(run / "weights")
    assert resolve_model(run) == run / "checkpoints/step-00000008"


def test_stray_files_are_left_alone_and_named(recipe, run, capfd):
    names = ["notes.txt", "step-00000009", "step-00000003.tmp-x", "step-abc"]
    for name in names:
        (run / "checkpoints" / name).write_text("mine")
    go(recipe, run, "train.max_steps=9", "checkpoint.keep=1")
    text = capfd.readouterr().err
    assert all(f"checkpoints/{name} is not a checkpoint; it is left alone" in text for name in names)
    kept = [path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert kept.count(b"mine") == 4 and steps(run) == [9]


def test_the_loss_watch_is_in_the_checkpoint(recipe, run):
    state = read_state(run / "checkpoints/step-00000008")
    assert state.recent_losses == [row["loss"] for row in rows(run) if "loss" in row]
    go(recipe, run, "train.max_steps=9")
    assert len(read_state(run / "checkpoints/step-00000009").recent_losses) == 9
    assert json.loads((run / "checkpoints/step-00000009/recipe.json").read_text())["train"]["max_steps"] == 9
