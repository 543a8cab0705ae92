"""The benchmark refuses wrong providers, reports what it measured, and draws it."""

import csv
import json

import pytest
import torch

from tnllm.bench import attention, providers
from tnllm.bench.attention import Shape, bench_attention
from tnllm.bench.report import write_csv, write_json
from tnllm.bench.tables import plot_attention, print_results
from tnllm.errors import UserError

CPU = torch.device("cpu")
SHAPES = [Shape(1, 2, length, 16) for length in (64, 128)]


@pytest.fixture
def results():
    return bench_attention(SHAPES, torch.float32, ["tnllm", "torch", "sdpa"], CPU, budget_s=0.01)


def test_every_provider_is_checked_and_timed(results):
    assert [row["provider"] for row in results["accuracy"]] == ["tnllm", "torch", "sdpa"]
    assert all(row["passed"] and row["o"] < 1e-5 for row in results["accuracy"])
    assert [(row["length"], row["provider"]) for row in results["rows"]] == [
        (length, name) for length in (64, 128) for name in ("tnllm", "torch", "sdpa")
    ]
    for row in results["rows"]:
        assert 0 < row["fwd_low_ms"] <= row["fwd_ms"] <= row["fwd_high_ms"]
        assert row["fwd_over_floor"] == pytest.approx(row["fwd_ms"] / row["floor_fwd_ms"])
        assert row["extra_mib"] is None
    assert results["environment"]["torch"] == torch.__version__


def test_a_wrong_provider_is_not_timed(monkeypatch):
    right = providers.PROVIDERS["torch"].attend

    def wrong(q, k, v, log_decay):
        return 1.1 * right(q, k, v, log_decay)

    bad = providers.Provider("torch", wrong, heads_first=True, devices=("cpu",))
    monkeypatch.setitem(providers.PROVIDERS, "torch", bad)
    logged: list[str] = []
    result = bench_attention(SHAPES, torch.float32, ["tnllm", "torch"], CPU, 0.01, logged.append)
    assert {row["provider"] for row in result["rows"]} == {"tnllm"}
    assert any(line.startswith("not timed: torch is wrong (relative error 0.1") for line in logged)


def test_a_provider_that_never_ends_loses_none_before_it(monkeypatch):
    def stuck(q, k, v, log_decay):
        raise KeyboardInterrupt

    monkeypatch.setitem(providers.PROVIDERS, "torch", providers.Provider("torch", stuck, devices=("cpu",)))
    kept: list[list[int]] = []
    result = bench_attention(
        SHAPES,
        torch.float32,
        ["tnllm", "torch"],
        CPU,
        0.01,
        on_row=lambda results: kept.append([row["length"] for row in results["rows"]]),
    )
    assert kept == [[64], [64, 128]] and len(result["rows"]) == 2


def test_missing_peers_are_named():
    logged: list[str] = []
    assert attention.choose(["tnllm", "fla"], CPU, torch.float32, logged.append)[0].name == "tnllm"
    assert logged == ["skipped fla: runs on cuda only"]
    with pytest.raises(UserError, match=r"provider 'fla2' is unknown.*did you mean 'fla'"):
        attention.choose(["fla2"], CPU, torch.float32, print)


def test_reports(results, tmp_path, capsys):
    write_json(results, tmp_path / "r.json")
    write_csv(results, tmp_path / "r.csv")
    plot_attention(results, tmp_path / "r.png")
    assert json.loads((tmp_path / "r.json").read_text()) == results
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(rows) == 6 and rows[0]["provider"] == "tnllm" and float(rows[0]["fwd_ms"]) > 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    print_results(results)
    shown = capsys.readouterr().out
    assert "relative RMS error against float64" in shown and "1 x 2 x 128 x 16" in shown
