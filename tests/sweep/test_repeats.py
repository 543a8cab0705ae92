"""Which tokens could be copied from the context, and the loss on them."""

from pathlib import Path

import pytest
import torch

from tests.sweep.repeats import distances, group_names, measure
from tnllm.data.loader import IGNORE
from tnllm.training.config import load_recipe
from tnllm.training.loop import train


def test_distance_to_the_latest_equal_pair_of_the_same_document() -> None:
    text = [7, 8, 9, 7, 8, 5, 7, 8, 7, 8]
    tokens, labels = torch.tensor(text[:-1]), torch.tensor(text[1:])
    whole = distances(tokens, labels, torch.tensor([0, 9, 9], dtype=torch.int32))
    assert whole.tolist() == [0, 0, 0, 3, 0, 0, 3, 0, 2]
    labels[3] = IGNORE
    split = distances(tokens, labels, torch.tensor([0, 4, 9, 9], dtype=torch.int32))
    assert split.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 2]


@pytest.mark.slow
def test_groups_add_up_to_the_validation_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "corpus.txt").write_text(
        "".join(f"line {i % 7} of a text that repeats itself\n" * 9 for i in range(90))
    )
    sets = ["model.num_layers=1", "model.model_dim=32", "model.glu_dim=48", "model.num_heads=1", "data.seq_len=64"]
    sets += ["train.max_steps=3", "train.global_batch_tokens=256", "train.micro_batch_size=2", "train.device=cpu"]
    sets += [f"data.path={tmp_path / 'corpus.txt'}", "data.val_fraction=0.1", "eval.tokens=null"]
    train(load_recipe("tiny", sets), tmp_path / "run")
    rows = list(measure(tmp_path / "run"))
    assert [row["repeat"] for row in rows] == group_names()
    total = sum(row["tokens"] for row in rows)
    mean = sum(row["tokens"] * row["val_loss"] for row in rows if row["tokens"]) / total
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert f'"val_loss": {mean:.5f}'[:-1] in log[-1]
