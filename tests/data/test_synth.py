"""Synthetic tasks: every counted label follows from its row, and a folder is a function of its options."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tnllm import assets
from tnllm.data import synth
from tnllm.data.loader import IGNORE, Loader, Source
from tnllm.data.shards import TokenStream, verify_hashes
from tnllm.data.synth import TASKS, Task, make_row, write_task
from tnllm.errors import UserError
from tnllm.tokenizer import Tokenizer
from tnllm.training.validation import accuracy

SMALL = {"seq_len": 48, "pairs": 4, "vocab": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(assets.tokenizer_model(None))


def answers(ids, counted):
    return [(position, ids[position]) for position, is_counted in enumerate(counted) if is_counted]


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("name", ["mqar", "recall", "noisy"])
def test_a_counted_value_followed_its_key_before(name, number):
    task = Task(name, **SMALL)
    ids, counted = make_row(task, 0, "train", number)
    assert len(ids) == len(counted) == 47
    found = answers(ids, counted)
    assert len(found) == 4 if name == "mqar" else found
    for position, value in found:
        key = ids[position - 1]
        assert key in task.keys and value in task.values
        before = [ids[i + 1] for i in range(position - 1) if ids[i] == key]
        assert before and set(before) == {value}
    # And whatever could be known counts: every key with a value that was there before.
    known = [i + 1 for i in range(46) if ids[i] in task.keys and ids[i] in ids[:i]]
    assert known == [position for position, _ in found]


@pytest.mark.parametrize("number", range(20))
def test_a_fuzzy_value_is_that_of_its_key(number):
    task = Task("fuzzy", seq_len=80, pairs=3, vocab=64)
    ids, counted = make_row(task, 1, "train", number)
    is_key = [token in task.keys for token in ids]
    # Phrases in turn: keys and values are told apart by their halves of the vocabulary.
    cuts = [0, *(i for i in range(1, 79) if is_key[i] and not is_key[i - 1]), 79]
    table: dict[int, list[int]] = {}
    for start, end in pairwise(cuts):
        value = [i for i in range(start, end) if not is_key[i]]
        known = ids[start] in table
        assert [counted[i] for i in value] == [known] * len(value) and not any(
            counted[start : value[0] if value else end]
        )
        text = [ids[i] for i in value]
        assert not known or table[ids[start]][: len(text)] == text
        table.setdefault(ids[start], text)


def test_copying_repeats_what_was_scattered():
    task = Task("copy", **SMALL)
    ids, counted = make_row(task, 0, "val", 3)
    text = [token for token in ids[:42] if token in task.values]
    assert len(text) == 4 and ids[42:] == [3, *text] and counted == [False] * 43 + [True] * 4
    assert all(4 <= token < 20 for token in ids[:42] if token not in text)


def test_near_questions_are_likelier():
    task = Task("mqar", seq_len=129, pairs=1, vocab=64)
    gaps = [make_row(task, 0, "train", number)[1].index(True) for number in range(300)]
    assert np.median(gaps) < 30 and max(gaps) > 100


@pytest.mark.parametrize("name", TASKS)
def test_a_folder_is_a_function_of_its_options(tmp_path, tokenizer, name, monkeypatch):
    monkeypatch.setattr(synth, "SHARD_ROWS", 8)
    task = Task(name, **SMALL)
    manifest = write_task(tmp_path / "a", [task], tokenizer, 20, 3, seed=5)
    assert manifest.total("documents", "train") == 20 and manifest.total("tokens", "val") == 3 * 48
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.suffix in (".bin", ".idx")}

    class Stop(Exception):
        pass

    def stop(status):
        if status.documents == 16:
            raise Stop

    with pytest.raises(Stop):
        write_task(tmp_path / "b", [task], tokenizer, 20, 3, seed=5, report=stop)
    with pytest.raises(UserError, match="is not finished; run the same"):
        TokenStream.open(tmp_path / "b")
    resumed = write_task(tmp_path / "b", [task], tokenizer, 20, 3, seed=5)
    assert resumed == manifest
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir() if path.name in files}
    verify_hashes(tmp_path / "b", resumed)
    with pytest.raises(UserError, match="was made with --seed 5"):
        write_task(tmp_path / "b", [task], tokenizer, 20, 3, seed=6)


def test_rows_reach_the_loader_whole_and_masked(tmp_path, tokenizer):
    write_task(tmp_path, [Task("mqar", **SMALL)], tokenizer, 10, 2)
    stream = TokenStream.open(tmp_path, "train")
    loader = Loader([Source(stream)], seq_len=96, batch_size=2, seed=3)
    seen = []
    for sample in range(10):  # two passes
        batch = loader.batch(sample, 1)
        for row in range(2):
            tokens = batch.tokens[0, 48 * row : 48 * row + 48].tolist()
            labels = batch.labels[0, 48 * row : 48 * row + 48]
            number = next(
                number for number in range(10) if make_row(Task("mqar", **SMALL), 0, "train", number)[0] == tokens[:-1]
            )
            ids, counted = make_row(Task("mqar", **SMALL), 0, "train", number)
            wanted = torch.tensor([*(ids[i] if counted[i] else IGNORE for i in range(1, 47)), IGNORE, IGNORE])
            assert torch.equal(labels, wanted)
            seen.append(number)
    assert sorted(seen) == sorted([*range(10), *range(10)])
    assert stream.document(4).tolist() == [*make_row(Task("mqar", **SMALL), 0, "train", 4)[0], tokenizer.eos_id]
    with pytest.raises(UserError, match=r"data.seq_len is 100, but the rows of .* have 48: give a multiple"):
        Loader([Source(stream)], seq_len=100, batch_size=2)


class Guesses:
    """Stands for a model that is right where `right` says so of a token."""

    device = torch.device("cpu")

    def __init__(self, right):
        self.right = right

    def correct(self, tokens, labels, cu_seqlens):
        return self.right[labels[labels != IGNORE]]


@pytest.mark.parametrize("rows_per_batch", [1, 3])
@pytest.mark.parametrize("name", TASKS)
def test_accuracy_is_told_by_number_of_pairs(tmp_path, tokenizer, name, rows_per_batch):
    tasks = [Task(name, seq_len=48, pairs=pairs, vocab=64) for pairs in (2, 4, 8)]
    manifest = write_task(tmp_path, tasks, tokenizer, 6, 10)
    assert manifest.options["pairs"] == [2, 4, 8]
    rows = [make_row(tasks[number % 3], 0, "val", number) for number in range(10)]
    right = torch.arange(64) % 3 > 0
    loader = Loader([Source(TokenStream.open(tmp_path, "val"))], seq_len=96, batch_size=1, shuffle=False)
    result = accuracy(Guesses(right), loader, rows_per_batch, None)
    for index, pairs in enumerate((2, 4, 8)):
        asked = [right[token] for ids, counted in rows[index::3] for _, token in answers(ids, counted)]
        assert result["val_accuracy_by_pairs"][pairs] == pytest.approx(float(torch.stack(asked).float().mean()))
    asked = [right[token] for ids, counted in rows for _, token in answers(ids, counted)]
    assert result["val_accuracy"] == pytest.approx(float(torch.stack(asked).float().mean()))
    # A single number of pairs is told once.
    write_task(tmp_path / "one", tasks[1:2], tokenizer, 1, 3)
    loader = Loader([Source(TokenStream.open(tmp_path / "one", "val"))], seq_len=96, batch_size=1, shuffle=False)
    assert set(accuracy(Guesses(right), loader, 1, None)) == {"val_accuracy"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("mqa"), "the task is 'mqa'; allowed: mqar, recall, fuzzy, noisy, copy"),
        (Task("mqar", vocab=9000), "--vocab is 9000; give 32 to 8192"),
        (Task("mqar", vocab=64, pairs=23), "--pairs is 23; give 1 to 22"),
        (Task("mqar", seq_len=32, pairs=8), "--seq-len is 32; mqar with --pairs 8 needs 33 tokens"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tokenizer, task, message):
    with pytest.raises(UserError, match=message):
        write_task(tmp_path / "a", [task], tokenizer, 1, 1)
    assert not (tmp_path / "a").exists()
