"""The norm benchmark checks before it times, and times full steps."""

import pytest
import torch

from tests.bench.norm import bench_norm, check, main


@pytest.mark.slow
def test_norms_and_steps():
    result = bench_norm([32, 48], 16, torch.float32, torch.device("cpu"), budget_s=0.01, step_preset="tiny")
    assert [(row["width"], row["norm"]) for row in result["norms"]] == [
        (width, name) for width in (32, 48) for name in ("srmsnorm", "rmsnorm", "layernorm")
    ]
    assert all(row["error"] < 1e-6 and row["fwd_ms"] > 0 for row in result["norms"])
    assert [row["norm"] for row in result["steps"]] == ["srmsnorm", "rmsnorm", "layernorm"]


@pytest.mark.slow
def test_the_table(capsys):
    main(["--widths", "32", "--rows", "8"])
    out = capsys.readouterr().out
    assert "srmsnorm" in out and "layernorm" in out


def test_the_check_detects_a_wrong_norm():
    x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    assert check(lambda x: 1.1 * torch.nn.functional.rms_norm(x, (8,), eps=1e-6), "wrong", x, dy) == pytest.approx(
        0.1, rel=0.01
    )
