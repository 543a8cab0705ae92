"""Time of a benchmark: forecast, fitted into the minutes, and nothing lost when it is stopped."""

import math

import pytest
import torch

from tnllm.bench import attention, providers
from tnllm.bench.attention import Shape, bench_attention
from tnllm.bench.budget import Budget
from tnllm.bench.decode import bench_decode
from tnllm.bench.timing import calls, measure
from tnllm.bench.train import Case, bench_training

CPU = torch.device("cpu")


def test_a_forecast_is_in_proportion_to_the_nearest_work():
    budget = Budget()
    assert budget.forecast("a", 4.0) is None and budget.nearest("a", 4.0) is None
    budget.learn("a", 1.0, 0.5)
    budget.learn("a", 100.0, 20.0)
    assert budget.forecast("a", 4.0) == 2.0 and budget.forecast("a", 400.0) == 80.0
    assert budget.nearest("a", 20.0) == 100.0 and budget.forecast("b", 1.0) is None


def test_parts_share_what_is_left_and_keep_an_eighth():
    budget = Budget(minutes=100)
    budget.part(4)
    assert 1400 < budget.left_s <= 1500
    spent = Budget(minutes=100)
    spent._ends -= 6000  # as if checks had taken all of it
    spent.part(1)
    assert 700 < spent.left_s <= 750
    assert Budget().left_s == math.inf


def test_what_does_not_fit_is_said_with_the_option():
    logged: list[str] = []
    budget = Budget(1, logged.append)
    assert budget.allows("x", None) and budget.allows("x", 7200.0, at_least=1.0) and not budget.allows("x", 7200.0)
    assert logged[0] == "timing x" and logged[2].startswith("not timed: x, about 2h00m where ")
    assert "(--max-minutes 1 raises it)" in logged[2]


def test_repetitions_fit_the_limit():
    count = 0

    def run():
        nonlocal count
        count += 1

    assert measure(run, CPU, budget_s=10.0, limit_s=0.0).repeats == 1 and count == 2
    assert measure(run, CPU, budget_s=0.0).repeats == 6
    assert calls(1.0, 0.5) == 7 and calls(0.01, 0.5) == 52 and calls(1e-9, 0.5) == 202


def attend(order, monkeypatch, name="torch", **more):
    """A provider that records lengths; with its right result, so that its check passes."""
    right = providers.PROVIDERS[name].attend

    def recorded(q, k, v, log_decay):
        order.append(q.shape[2])
        return right(q, k, v, log_decay)

    new = providers.Provider(name, recorded, heads_first=True, devices=("cpu",), **more)
    monkeypatch.setitem(providers.PROVIDERS, name, new)


def test_a_length_that_does_not_fit_is_extrapolated_from_a_shorter_one(monkeypatch):
    lengths: list[int] = []
    attend(lengths, monkeypatch, quadratic_memory=True)
    # Whatever a call takes here, 4,096 x 4,096 scores are forecast far above this.
    monkeypatch.setattr(attention._Clock, "_once", lambda self, run: (run(), 100.0)[1])
    logged: list[str] = []
    result = bench_attention(
        [Shape(1, 1, 4096, 16)], torch.float32, ["torch"], CPU, 0.01, logged.append, budget=Budget(1, logged.append)
    )
    (row,) = result["rows"]
    assert row["extrapolated_from"] == 1024 and max(lengths) == 1024
    work = 4096 * 4097 / (1024 * 1025)
    assert row["fwd_ms"] == pytest.approx(100e3 * work) and row["fwd_bwd_ms"] == pytest.approx(100e3 * work)
    assert row["fwd_low_ms"] is None and row["fwd_bwd_repeats"] == 0
    assert any("extrapolated from 1024 tokens" in line for line in logged)
    assert any(line.startswith("not timed: torch at 1 x 4096, about ") for line in logged)


def test_without_a_limit_everything_is_timed(monkeypatch):
    result = bench_attention([Shape(1, 1, 2048, 16)], torch.float32, ["tnllm"], CPU, 0.01)
    assert [row["extrapolated_from"] for row in result["rows"]] == [None]


def test_ctrl_c_keeps_the_rows(monkeypatch):
    def stuck(q, k, v, log_decay):
        if q.shape[1] == 128:
            raise KeyboardInterrupt
        return providers.PROVIDERS["tnllm"].attend(q, k, v, log_decay)

    monkeypatch.setitem(providers.PROVIDERS, "torch", providers.Provider("torch", stuck, devices=("cpu",)))
    budget = Budget()
    shapes = [Shape(1, 2, length, 16) for length in (64, 128)]
    result = bench_attention(shapes, torch.float32, ["torch"], CPU, 0.01, budget=budget)
    assert [row["length"] for row in result["rows"]] == [64] and budget.interrupted
    with pytest.raises(KeyboardInterrupt):
        budget.close()


def test_decoding_skips_by_name():
    budget = Budget(0)
    result = bench_decode("tiny", [64], [], [], torch.float32, CPU, 0.01, budget=budget)
    assert result["rows"] == [] and "--max-minutes 0 raises it" in result["skipped"][0]["reason"]


def test_training_skips_by_name():
    result = bench_training([Case("tiny", "transnormer", 32, 2)], CPU, compiled=False, steps=1, budget=Budget(0))
    assert [row["status"] for row in result["rows"]] == ["skipped"]
    assert "--max-minutes 0 raises it" in result["rows"][0]["reason"]
