"""The decoding benchmark: its check, its rows, its counts of bytes."""

import json

import pytest
import torch

from tests.small_models import small_model
from tnllm.bench import decode
from tnllm.bench.decode_baseline import FixedStep, cache_of
from tnllm.cli.main import main
from tnllm.modeling.config import get_preset
from tnllm.modeling.cpu_step import CpuStep
from tnllm.modeling.flops import state_bytes
from tnllm.modeling.model import build_model


def run(capfd, *args):
    with pytest.raises(SystemExit) as stop:
        main(["bench-decode", "--device", "cpu", *args])
    return stop.value.code, *capfd.readouterr()


SMALL = ("--preset", "tiny", "--positions", "64:128", "--batches", "1,2", "--contexts", "32", "--seconds", "0.01")


@pytest.mark.slow
def test_rows_and_files(capfd, tmp_path):
    files = [tmp_path / name for name in ("d.json", "d.csv", "d.svg")]
    code, out, err = run(capfd, *SMALL, "--json", str(files[0]), "--csv", str(files[1]), "--plot", str(files[2]))
    assert code == 0
    assert "no GPU in use" in err and "slowest position" in out and "of the limit" in out
    result = json.loads(files[0].read_text())
    rows = {(row["provider"], row["sweep"], row["batch"], row["position"]): row for row in result["rows"]}
    assert set(rows) == {
        ("tnllm", "position", 1, 64), ("tnllm", "position", 1, 128), ("tnllm", "batch", 1, 1024),
        ("tnllm", "batch", 2, 1024), ("transformer", "batch", 1, 32), ("transformer", "batch", 2, 32),
    }  # fmt: skip
    config = get_preset("tiny")
    state = config.num_heads * config.head_dim**2 * 4 * (config.num_layers + 1)  # layer 0 holds twice as much
    assert rows["tnllm", "batch", 2, 1024]["state_gib"] * 2**30 == 2 * state
    cache = 2 * config.num_layers * config.model_dim * 32 * 4
    assert rows["transformer", "batch", 2, 32]["state_gib"] * 2**30 == 2 * cache
    for row in rows.values():
        bytes_moved = row["weight_gib"] + row["state_gib"] * (2 if row["provider"] == "tnllm" else 1)
        rate = result["environment"]["copy_tb_per_s"] * 1e12 / 2**30
        assert row["bandwidth_share"] == pytest.approx(bytes_moved / rate / (row["step_ms"] / 1e3))
        assert row["low_ms"] <= row["step_ms"] <= row["high_ms"]
    assert len(files[1].read_text().splitlines()) == 1 + len(rows)
    assert files[2].read_text().lstrip().startswith("<?xml")


@pytest.mark.slow
def test_a_hybrid_is_timed_with_its_cache(capfd, tmp_path):
    args = ("--softmax-every", "2", "--positions", "64", "--batches", "2", "--contexts", "none", "--seconds", "0.01")
    code, _, err = run(capfd, "--preset", "tiny", *args, "--json", str(tmp_path / "d.json"))
    assert code == 0, err
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    config = get_preset("tiny", softmax_every=2)
    for row in rows:
        assert row["softmax_every"] == 2
        assert row["state_gib"] * 2**30 == row["batch"] * state_bytes(config, row["position"], cache_itemsize=4)


def test_a_wrong_step_is_not_timed(capfd, monkeypatch):
    right = CpuStep.__call__

    def wrong(self, tokens):
        self._state.layers[1] *= 0.99  # a decay that is slightly off
        return right(self, tokens)

    monkeypatch.setattr(CpuStep, "__call__", wrong)
    code, out, err = run(capfd, *SMALL)
    assert code == 1 and out == ""
    assert "the decoding step of tiny transnormer is wrong, so nothing is timed" in err.splitlines()[-1]


@torch.no_grad()
def test_the_baseline_step_is_the_models():
    model = build_model(get_preset("tiny", kind="transformer"), seed=0)
    tokens = torch.randint(3, 8000, (3, 20))
    state = model.hidden(tokens[:, :-1])[1]
    logits = FixedStep(model, cache_of(state), compiled=False)(tokens[:, -1])
    # Order of sums in fp32.
    torch.testing.assert_close(logits, model(tokens)[0][:, -1], atol=1e-5, rtol=1e-5)


def test_prompt_lookup_is_timed_beside_plain_decoding(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_LOOKUP", {False: (40, 1)})
    args = ("--preset", "tiny", "--positions", "64", "--batches", "1", "--contexts", "none", "--seconds", "0.01")
    code, out, err = run(capfd, *args, "--prompt-lookup", "8", "--json", str(tmp_path / "d.json"))
    assert code == 0, err
    rows = {row["text"]: row for row in json.loads((tmp_path / "d.json").read_text())["lookup"]}
    assert rows["repetitive"]["accepted_share"] > 0.9 and rows["ordinary"]["proposed"] == 0
    assert rows["repetitive"]["equal_share"] == rows["ordinary"]["equal_share"] == 1
    assert "equal texts" in out


def test_prompt_lookup_is_refused_before_anything_is_timed(capfd):
    code, out, err = run(capfd, *SMALL, "--dtype", "int8", "--prompt-lookup", "8")
    assert code == 2 and out == ""
    assert "prompt_lookup gains nothing with int8 weights" in err.splitlines()[-1]


@pytest.mark.slow
def test_what_does_not_fit_is_skipped_and_said(capfd, monkeypatch):
    monkeypatch.setattr(decode, "_usable_bytes", lambda device: 600_000)
    code, out, _ = run(capfd, *SMALL)
    assert code == 0 and out.count("skipped: ") == 1
    assert "skipped: tnllm, batch 2, position 1K (needs about" in out


def test_untied_embeddings_are_looked_up_not_read():
    model = small_model()
    table = model.embed_tokens.weight
    assert decode._weight_bytes(model, 3) == sum(p.nbytes for p in model.parameters()) - table.nbytes + 3 * 64 * 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "385"], "model.preset is '385'; allowed:"),
        (["--positions", "9x"], "--positions has '9x'; write tokens such as 1000"),
        (["--batches", "8:2"], "--batches is '8:2'; the first length must not exceed the second"),
        (["--contexts", "nine"], "--contexts has 'nine'"),
        (["--dtype", "fp16"], "--dtype is 'fp16'; allowed: bf16, fp32, int8"),
    ],
)
def test_bad_input(capfd, args, message):
    code, out, err = run(capfd, *args)
    assert code == 2 and out == ""
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["transnormer", "transformer"])
def test_int8_is_checked_against_its_own_values_and_its_bytes_are_counted(kind):
    config = get_preset("tiny", kind=kind)
    model, exact = (build_model(config, dtype=dtype, seed=0) for dtype in (torch.int8, torch.float32))
    checked = decode._check(model, False)
    # float32's error against the rounded values, not the rounding's, which is a hundred times as large.
    assert checked["passed"] and checked["step_error"] < 1e-5
    assert 0.25 < decode._weight_bytes(model, 1) / decode._weight_bytes(exact, 1) < 0.35
