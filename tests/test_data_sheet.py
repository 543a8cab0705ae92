"""Shares are of what was measured and of the card's data sheet; an unknown card is said to be unknown."""

import pytest
import torch

from tnllm.bench import train as bench
from tnllm.bench.report import environment_line
from tnllm.bench.train import Case
from tnllm.device import GPUS, data_sheet
from tnllm.modeling.flops import flops_per_token
from tnllm.training.display import RunDisplay

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        # Of the same chip, with other rates.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(monkeypatch, name, card):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert data_sheet(CUDA) == (GPUS[card] if card else None)
    assert data_sheet(torch.device("cpu")) is None


def test_the_head_of_a_report_has_both():
    rates = {"copy_tb_per_s": 3.02, "matmul_tflop_per_s": 723.0, "sheet_tb_per_s": 3.35, "sheet_tflop_per_s": 989.0}
    line = environment_line({"device": "H100", **rates, "dtype": "bfloat16"})
    assert line == (
        "H100, copy 3.02 TB/s (90% of the data sheet's 3.35), "
        "bf16 matrix product 723 TFLOP/s (73% of the data sheet's 989); dtype bfloat16"
    )
    unknown = rates | {"sheet_tb_per_s": None, "sheet_tflop_per_s": None}
    assert environment_line({"device": "X", **unknown, "dtype": "f"}).count("(data sheet unknown)") == 2
    assert environment_line({"device": "cpu", "copy_tb_per_s": 0.01, "dtype": "f"}) == "cpu, copy 0.01 TB/s; dtype f"


def test_a_step_has_both_utilisations(monkeypatch):
    monkeypatch.setattr(bench, "data_sheet", lambda device: GPUS["h100"])
    case = Case("tiny", "transnormer", 32, 2)
    row = bench.time_case(case, torch.device("cpu"), "auto", False, 1, 0, peak=1e12)
    work = row["tokens_per_s"] * flops_per_token(case.model, 32)
    assert row["mfu"] == pytest.approx(work / 1e12) and row["mfu_sheet"] == pytest.approx(work / 989e12)


@pytest.mark.parametrize(("share", "shown"), [(0.468, "data sheet 46.8%"), (None, "data sheet unknown")])
def test_the_line_of_a_run_has_both(tmp_path, capsys, share, shown):
    row = {
        "step": 1,
        "loss": 1.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_s": 1e3,
        "tokens_per_step": 10,
        "mem_gib": 1.0,
    }
    with RunDisplay(tmp_path / "train.log", 3) as display:
        display.row({**row, "mfu": 0.521, "mfu_sheet": share})
    assert f"mfu 52.1% ({shown})" in capsys.readouterr().err
