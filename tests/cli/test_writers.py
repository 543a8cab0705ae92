"""Every command that writes a folder is its only writer."""

import os

import pytest

from tnllm.files import LOCK, only_writer

COMMANDS = {
    "train": "train tiny --set train.device=cpu --out OUT",
    "sweep": "sweep SWEEP --out OUT",
    "convert": "convert MODEL OUT --to hf --overwrite",
    "data sample": "data sample -o OUT",
    "data tokenize": "data tokenize CORPUS -o OUT",
    "data synth": "data synth mqar --seq-len 64 --pairs 4 --vocab 256 -o OUT",
    "data clean": "data clean CORPUS -o OUT",
    "data dedup": "data dedup CORPUS -o OUT",
    "data self-clean": "data self-clean CORPUS -o OUT",
    "tokenizer train": "tokenizer train CORPUS --vocab-size 340 -o OUT",
}


@pytest.fixture
def typed(small_weights, tmp_path):
    """A command of COMMANDS as words."""
    (tmp_path / "corpus.txt").write_text("Once upon a time there was a king who had three sons.\n\n" * 30)
    (tmp_path / "sweep.yaml").write_text("groups: {one: {recipe: tiny}}\n")
    names = {"CORPUS": "corpus.txt", "SWEEP": "sweep.yaml", "OUT": "out"}
    values = {"MODEL": str(small_weights), **{key: str(tmp_path / name) for key, name in names.items()}}
    return lambda command: [values.get(word, word) for word in command.split()]


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_second_writer_is_refused(tnllm, typed, tmp_path, monkeypatch, command):
    monkeypatch.setattr("tnllm.sweep.run._LOCK_WAIT_S", 0)
    out = tmp_path / "out"
    with only_writer(out):
        code, stdout, stderr = tnllm(*typed(command))
        assert [path.name for path in out.iterdir()] == [LOCK]
    assert (code, stdout) == (2, "")
    assert f"tnllm: {out} is being written by pid {os.getpid()} on " in stderr.splitlines()[-1]


def test_of_two_evaluations_of_a_model_one_writes(tnllm, small_weights, tmp_path):
    """Others may write into folders of their own below the same --out."""
    asked = ("eval", "--tasks", "piqa", "--limit", 1, "--model", small_weights, "--out", tmp_path / "out")
    assert tnllm(*asked)[0] == 0
    (folder,) = (tmp_path / "out").iterdir()
    with only_writer(tmp_path / "out"):
        assert tnllm(*asked)[0] == 0
    before = sorted(path.name for path in folder.iterdir())
    with only_writer(folder):
        code, _, stderr = tnllm(*asked)
    assert code == 2 and f"{folder} is being written by pid {os.getpid()} on " in stderr.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == before and len(before) == 2


@pytest.mark.parametrize("kind", ["folder", "link"])
@pytest.mark.parametrize("command", ["data sample", "tokenizer train"])
def test_a_lock_that_is_no_file_is_named(tnllm, typed, tmp_path, command, kind):
    lock, other = tmp_path / "out" / LOCK, tmp_path / "other"
    lock.parent.mkdir()
    other.write_text("kept")
    lock.mkdir() if kind == "folder" else lock.symlink_to(other)
    code, _, stderr = tnllm(*typed(COMMANDS[command]))
    assert (
        code == 2 and f"{lock} is not a file, so {lock.parent} cannot be locked; remove it" in stderr.splitlines()[-1]
    )
    assert [path.name for path in lock.parent.iterdir()] == [LOCK] and other.read_text() == "kept"
