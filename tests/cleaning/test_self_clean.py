import json
import os
import random
import signal

import pytest

from tests.cleaning.noise import gibberish
from tests.cleaning.texts import ENGLISH
from tnllm.cleaning.recipe import load_clean_recipe
from tnllm.cleaning.records import RecordWriter, read_records
from tnllm.cleaning.run import self_clean_alone
from tnllm.errors import Terminated, UserError
from tnllm.training import loop

pytestmark = pytest.mark.slow

TINY = [
    "model.num_layers=1",
    "model.model_dim=32",
    "model.num_heads=1",
    "model.glu_dim=32",
    "data.seq_len=64",
    "train.max_steps=60",
    "train.global_batch_tokens=256",
    "train.micro_batch_size=4",
    "schedule.warmup_steps=2",
    "checkpoint.every_steps=0",
]


def settings(folder, **changes):
    values = {"rounds": 2, "drop_highest": 0.1, "recipe": "tiny", "set": TINY, "compare": True, **changes}
    sets = [f"self_clean.{key}={json.dumps(value)}" for key, value in values.items()]
    paths = {"path": str(folder / "corpus.jsonl.gz")}
    more = [f"self_clean.held_out={json.dumps(str(folder / 'held-out.jsonl.gz'))}", "output.tally_field=noise"]
    return load_clean_recipe(None, [*sets, *more, f"input.path={json.dumps(paths['path'])}"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty texts of the same words in new orders, a tenth of them spoiled."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    sentences = [part.strip() for part in ENGLISH.replace("\n", " ").split(",")]
    with RecordWriter(folder / "corpus.jsonl.gz") as writer, RecordWriter(folder / "held-out.jsonl.gz") as held_out:
        for number in range(66):
            text = ", ".join(rng.sample(sentences, 6))
            noise = "gibberish" if number % 10 == 9 and number < 60 else "none"
            record = {"text": gibberish(text, rng) if noise != "none" else text, "source": "w", "noise": noise}
            (writer if number < 60 else held_out).write({"id": f"d{number}", **record})
    return folder


@pytest.fixture(scope="module")
def cleaned(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "out"
    return out, self_clean_alone(settings(corpus), out, "cpu")


def test_unlikely_texts_are_dropped(cleaned):
    out, report = cleaned
    assert report["tally"]["gibberish"] == {"in": 6, "out": 0, "rejected": {"self-clean 1": 6, "self-clean 2": 0}}
    assert report["tally"]["none"]["rejected"]["self-clean 1"] == 0
    kept = [r for path in (out / "clean").glob("*.gz") for r in read_records(path)]
    lost = [r for path in sorted((out / "rejected").glob("*.gz")) for r in read_records(path)]
    assert len(kept) == report["documents_out"] == 49 and len(lost) == 11
    verdict = lost[0]["rejected"]
    assert verdict["step"] == "self-clean" and verdict["round"] == 1 and verdict["bits_per_byte"] > verdict["range"][1]


def test_losses_are_reported_for_every_model(cleaned):
    out, report = cleaned
    result = report["self_clean"]
    losses = [row["held_out"] for row in result["rounds"]] + [result["after"], result["random_subset"]]
    assert len(losses) == 4 and all(0 < loss["bits_per_byte"] < 8 for loss in losses)
    assert sum(result["rounds"][0]["histogram"]["counts"]) == 60
    page = (out / "report.html").read_text()
    assert "a random subset of that size" in page and "round 2" in page


def test_a_second_call_redoes_nothing(cleaned, corpus):
    out, report = cleaned
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.gz")}
    assert self_clean_alone(settings(corpus), out, "cpu") == report
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.gz")} == before


def test_lost_files_are_rebuilt_identically(cleaned, corpus):
    out, report = cleaned
    shard = out / "clean" / "00000.jsonl.gz"
    data = shard.read_bytes()
    for path in (shard, out / "work" / "self-clean" / "round-2" / "scores" / "00000.jsonl"):
        path.unlink()
    assert self_clean_alone(settings(corpus), out, "cpu") == report
    assert shard.read_bytes() == data


def test_other_settings_are_refused(cleaned, corpus):
    with pytest.raises(UserError, match="was made with other settings"):
        self_clean_alone(settings(corpus, rounds=1), cleaned[0], "cpu")


def test_training_takes_the_device_that_is_named(corpus, tmp_path, monkeypatch):
    class Trained(Exception):
        pass

    def train(config, out, resume, outer_command):
        raise Trained(config.train.device)

    monkeypatch.setattr("tnllm.cleaning.self_clean.train", train)
    with pytest.raises(Trained, match=r"^cuda:1$"):
        self_clean_alone(settings(corpus), tmp_path / "out", "cuda:1")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stop_while_training_names_no_option_of_train(corpus, tmp_path, monkeypatch, capsys, number, error):
    def stopped(*args):
        os.kill(os.getpid(), number)
        return train_step(*args)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(error) as raised:
        self_clean_alone(settings(corpus), tmp_path / "out", "cpu")
    said = str(raised.value) + capsys.readouterr().err
    assert "run the same command again to resume" in said and "--resume" not in said
    monkeypatch.undo()


def test_no_rounds_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"self_clean\.rounds is 0"):
        self_clean_alone(settings(corpus, rounds=0), tmp_path / "out", "cpu")
