"""The benchmark refuses wrong providers, reports what it measured, and draws it."""

import csv
import json
import sys
from dataclasses import replace
from types import ModuleType

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


def fake(monkeypatch, name, function):
    """A module of this name, in place of a package that runs on a GPU only."""
    for depth in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:depth])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    setattr(sys.modules[name], function.__name__, function)


def on_cpu(name):
    return replace(providers.PROVIDERS[name], devices=("cpu",), module=None)


def test_mlstm_gets_gates_that_are_the_decay(monkeypatch):
    def mlstm_siging_chunkwise__xl_chunk(q, k, v, i, f, *, normalize, autocast_kernel_dtype):
        """As documented: heads first, the gates before their sigmoids, a scale of D^-0.5; chunks of 128 tokens."""
        assert not normalize and q.shape[2] % 128 == 0
        decay = torch.nn.functional.logsigmoid(f).cumsum(-1)
        weight = (decay[..., :, None] - decay[..., None, :]).tril().exp().tril() * i.sigmoid()[..., None, :]
        return ((q @ k.mT) * weight.to(q.dtype) * q.shape[-1] ** -0.5) @ v

    fake(
        monkeypatch,
        "mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging",
        mlstm_siging_chunkwise__xl_chunk,
    )
    errors = attention.check(on_cpu("mlstm"), SHAPES[0], torch.float32, CPU)
    # Decays over 512 tokens as differences of sums in fp32.
    assert set(errors) == {"o", "dq", "dk", "dv"} and max(errors.values()) < 1e-4
    monkeypatch.setitem(providers.PROVIDERS, "mlstm", on_cpu("mlstm"))
    logged: list[str] = []
    result = bench_attention(SHAPES, torch.float32, ["mlstm"], CPU, 0.01, logged.append)
    assert [row["length"] for row in result["rows"]] == [128]
    assert "skipped mlstm at 1 x 64: takes multiples of 128 tokens" in logged


def gated_delta_rule(q, k, v, g, beta):
    """[B, T, H, D]; g and beta by token; token by token, as the papers write it."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    state, outputs = 0 * k[:, 0, :, :, None] * v[:, 0, :, None], []
    for t in range(q.shape[1]):
        kt, vt, b = k[:, t, :, :, None], v[:, t, :, None], beta[:, t, :, None, None]
        state = g[:, t].exp()[..., None, None] * state
        state = state - b * kt @ (kt.mT @ state) + b * kt @ vt
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1) * q.shape[-1] ** -0.5


def test_flash_qla_and_flashinfer_are_checked_against_what_they_compute(monkeypatch, capsys):
    def chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel):
        return gated_delta_rule(q, k, v, g, beta), None

    fake(monkeypatch, "flash_qla", chunk_gated_delta_rule)
    errors = attention.check(on_cpu("flash-qla"), SHAPES[0], torch.float32, CPU)
    assert set(errors) == {"o", "dq", "dk", "dv"} and max(errors.values()) < 1e-5

    def chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens, use_qk_l2norm_in_kernel):
        """Packed [tokens, H, D]; the decay itself for g."""
        packed = [x.float().unflatten(0, (len(cu_seqlens) - 1, -1)) for x in (q, k, v, g.log(), beta)]
        return gated_delta_rule(*packed).flatten(0, 1).detach().to(v.dtype)

    fake(monkeypatch, "flashinfer.gdn_prefill", chunk_gated_delta_rule)
    monkeypatch.setitem(providers.PROVIDERS, "flashinfer", on_cpu("flashinfer"))
    assert attention.check(on_cpu("flashinfer"), SHAPES[0], torch.float32, CPU)["o"] < 1e-5
    result = bench_attention(SHAPES[:1], torch.bfloat16, ["flashinfer"], CPU, 0.01)
    (checked,), (row,) = result["accuracy"], result["rows"]
    assert checked["passed"] and checked["dq"] is None
    assert row["fwd_ms"] > 0 and row["fwd_bwd_ms"] is None and row["extra_mib"] is None
    print_results(result)
    assert "no gradients" in capsys.readouterr().out


def test_a_peer_that_fails_takes_no_other_with_it(monkeypatch):
    def broken(q, k, v, log_decay):
        raise RuntimeError("no kernel image\nmore")

    peer = providers.Provider("fla", broken, devices=("cpu",), module="torch")
    monkeypatch.setitem(providers.PROVIDERS, "fla", peer)
    logged: list[str] = []
    result = bench_attention(SHAPES[:1], torch.float32, ["fla", "tnllm"], CPU, 0.01, logged.append)
    assert [row["provider"] for row in result["rows"]] == ["tnllm"]
    assert "skipped fla: RuntimeError: no kernel image" in logged


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fla", "lightning-attn", "mlstm", "flash-qla", "flashinfer"])
def test_peers_compute_what_they_are_said_to(name):
    provider = providers.PROVIDERS[name]
    if reason := provider.missing(torch.device("cuda"), torch.bfloat16):
        pytest.skip(reason)
    errors = attention.check(provider, Shape(1, 4, 512, 128), torch.bfloat16, torch.device("cuda"))
    assert max(errors.values()) <= attention.ERROR_LIMIT[torch.bfloat16]


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
