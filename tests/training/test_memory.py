"""A run is fitted to the machine before it starts."""

import pytest
import torch

from tests.training.sections import memory_of
from tnllm.errors import UserError
from tnllm.training import memory
from tnllm.training.config import load_recipe

CPU = torch.device("cpu")


def fit(monkeypatch, free_gib: float):
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free_gib * 2**30))
    logged: list[str] = []
    config = load_recipe("385m")
    sections = config.model, config.lora, config.train, config.parallel, config.data.seq_len
    return config.model_copy(update={"train": memory.fit_memory(*sections, CPU, logged.append)}), logged


def test_a_recipe_that_fits_is_left_alone(monkeypatch):
    config, logged = fit(monkeypatch, 500)
    assert config == load_recipe("385m") and logged == []


def test_fewer_rows_at_a_time_learn_from_the_same_tokens(monkeypatch):
    config, logged = fit(monkeypatch, 22)
    assert config.train.micro_batch_size < 16
    assert config.train.global_batch_tokens == load_recipe("385m").train.global_batch_tokens
    assert config.accumulation_steps * config.train.micro_batch_size == 256
    assert memory_of(config, low_precision=False).total < 22 * 2**30
    assert logged == [
        f"train.micro_batch_size is {config.train.micro_batch_size} instead of 16, to fit into 20.24 GiB on cpu"
    ]


def test_what_cannot_fit_is_refused(monkeypatch):
    with pytest.raises(
        UserError, match=r"one row of 2048 tokens needs about .* and 1\.84 GiB are free on cpu; lower data"
    ):
        fit(monkeypatch, 2)


def test_recomputation_that_would_fit_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"set train.activation_checkpointing=selective, which needs 8\.94 GiB"):
        fit(monkeypatch, 10)


def test_free_memory_is_what_the_machine_has():
    assert 2**28 < memory.free_bytes(CPU) < 2**50
