"""Full training steps: checked, timed with the trainer's own step, reported."""

import csv
import json

import pytest
import torch

from tnllm.bench import train as bench
from tnllm.bench.report import write_csv
from tnllm.bench.tables import compare_training, plot_training, print_training_head, print_training_row
from tnllm.bench.train import Case, RandomLoader, Step, bench_training, run_config
from tnllm.errors import UserError
from tnllm.modeling.config import get_preset
from tnllm.modeling.flops import count_parameters, flops_per_token
from tnllm.training.sections import DataSection

CPU = torch.device("cpu")
CASES = [Case("tiny", kind, 32 * rows, 4 // rows) for rows in (1, 2) for kind in ("transnormer", "transformer")]


@pytest.fixture(scope="module")
def results():
    return bench_training(CASES, CPU, compiled=False, steps=2, warmup=0)


def test_every_case_is_checked_and_timed(results):
    assert [(row["kind"], row["passed"]) for row in results["accuracy"]] == [
        ("transnormer", True),
        ("transformer", True),
    ]
    assert [(row["seq_len"], row["kind"]) for row in results["rows"]] == [(c.seq_len, c.kind) for c in CASES]
    for row in results["rows"]:
        assert row["status"] == "ok" and row["tokens"] == 128
        assert 0 < row["low_ms"] <= row["step_ms"] <= row["high_ms"]
        assert row["tokens_per_s"] == pytest.approx(128e3 / row["step_ms"])
        assert row["mfu"] is None and row["peak_gib"] is None
        assert row["first_loss"] == pytest.approx(9.01, abs=0.1)  # ln 8192: an untrained model
    json.dumps(results)


def test_what_is_timed_is_a_whole_step():
    step = Step(run_config(CASES[0], CPU, False), CPU)
    before = [parameter.clone() for parameter in step.trainer.model.parameters()]
    for _ in range(9):
        step()
    assert all(not torch.equal(a, b) for a, b in zip(before, step.trainer.model.parameters(), strict=True))
    losses = step.measured["loss"]
    assert len(losses) == 9 and losses[8] < losses[0]  # the ninth batch is the first again


def test_utilisation_is_of_the_models_own_work():
    row = bench.time_case(CASES[0], CPU, "auto", False, 1, 0, peak=1e12)
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops_per_token(CASES[0].model, 32) / 1e12)


def test_the_baseline_of_the_same_size():
    ours = count_parameters(Case("385m", "transnormer", 1, 1).model)
    narrow = count_parameters(Case("385m", "transformer", 1, 1).model)
    equal = count_parameters(Case("385m", "transformer", 1, 1, same="parameters").model)
    assert 0.93 < narrow / ours < 0.95
    assert equal == pytest.approx(ours, rel=0.01)


def test_a_wrong_step_is_not_timed(monkeypatch):
    make = bench.make_trainer

    def wrong(*args):
        trainer = make(*args)
        true = trainer.loss_sum
        trainer.loss_sum = lambda batch: 1.01 * true(batch)
        return trainer

    monkeypatch.setattr(bench, "make_trainer", wrong)
    logged: list[str] = []
    result = bench_training(CASES[:1], CPU, compiled=False, steps=1, log=logged.append)
    assert result["rows"] == [] and not result["accuracy"][0]["passed"]
    assert any(
        line.startswith("not timed: tiny transnormer is wrong (relative error of the loss 0.01") for line in logged
    )


def test_nan_fails_the_check(monkeypatch):
    monkeypatch.setattr(bench, "LIMITS", {torch.float32: (float("nan"), 1.0)})
    assert not bench.check(CASES[0], CPU, False, "auto")["passed"]


@pytest.mark.slow
def test_recomputation_and_documents_pass_the_check():
    for kind in ("transnormer", "transformer"):
        for mode in ("selective", "full"):
            case = Case("tiny", kind, 32, 2, activation_checkpointing=mode, packing="reset")
            assert bench.check(case, CPU, False, "auto")["passed"]


def test_documents_are_rows():
    batch = RandomLoader(DataSection(seq_len=16, packing="reset"), rows=3, vocab_size=100).batch(0, 3)
    assert batch.tokens.shape == (1, 48) and batch.cu_seqlens.tolist() == [0, 16, 32, 48]


def test_out_of_memory_is_a_row(monkeypatch, capsys):
    def full(self):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Step, "__call__", full)
    row = bench.time_case(CASES[0], CPU, "auto", False, 1, 0, None)
    assert row["status"] == "out of memory" and row["tokens_per_s"] is None
    print_training_row(row)
    assert capsys.readouterr().out.rstrip().endswith("out of memory")
    assert compare_training([row]) == []


def test_reports(results, tmp_path, capsys):
    print_training_head(results)
    print_training_row(results["rows"][0])
    out = capsys.readouterr().out
    assert "check against fp32 on the CPU, tiny transnormer: loss" in out and "tokens/s" in out
    write_csv(results, tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file:
        assert [row["kind"] for row in csv.DictReader(file)] == [c.kind for c in CASES]
    rows = [{**row, "tokens_per_s": speed} for row, speed in zip(results["rows"], (300, 100, 240, 40), strict=True)]
    assert compare_training(rows) == [
        "tiny: transnormer over transformer, tokens/s: 3.00 at 32, 6.00 at 64",
        "tiny: transnormer's slowest length has 80% of its fastest's speed",
        "tiny: transformer's slowest length has 40% of its fastest's speed",
    ]
    pytest.importorskip("matplotlib")
    plot_training(results, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_a_hybrid_is_timed():
    case = Case("tiny", "transnormer", 32, 2, softmax_every=4)
    result = bench_training([case], CPU, compiled=False, steps=1)
    assert result["accuracy"][0]["passed"] and result["rows"][0]["softmax_every"] == 4
    assert result["rows"][0]["parameters"] == count_parameters(get_preset("tiny", softmax_every=4))


def test_an_unknown_preset_is_told():
    with pytest.raises(UserError, match=r"model.preset is '386m'.*did you mean '385m'"):
        _ = Case("386m", "transnormer", 1, 1).model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("every", [0, 5])
@pytest.mark.parametrize("packing", ["concat", "reset"])
def test_compiled_on_a_gpu(packing, every):
    kinds = ("transnormer", "transformer")
    cases = [Case("demo", kind, 512, 4, packing=packing, softmax_every=every) for kind in kinds]
    result = bench_training(cases, torch.device("cuda"), steps=3)
    assert all(row["passed"] for row in result["accuracy"])
    assert all(row["status"] == "ok" and 0 < row["mfu"] < 1 and row["peak_gib"] > 0.1 for row in result["rows"])
