"""A long stream against float64: the small form of `python -m tests.bench.stream`, and its verdict."""

import json

import pytest

from tests.bench import stream


def run(capfd, *args):
    return stream.main(list(args)), *capfd.readouterr()


@pytest.mark.slow
def test_float32_holds_where_the_naive_form_breaks(capfd, tmp_path):
    file = tmp_path / "s.json"
    code, out, err = run(capfd, "--tokens", "4096", "--json", str(file))
    assert code == 0 and "not finite from token" in out and "4096 tokens: gap" in err
    result = json.loads(file.read_text())
    assert [row["tokens"] for row in result["model"]] == [1024, 4096]
    assert all(max(row["logits_gap"], row["steps_gap"]) < stream.GAP_LIMIT for row in result["model"])
    # Memory of one chunk and two states, whatever was read: less than one MiB a thousand tokens would be 7.
    assert result["model"][-1]["resident_mib"] - result["model"][0]["resident_mib"] < 150
    last = {row["decay"]: row for row in result["layer"] if row["tokens"] == 4096}
    # e^(0.84 t) and e^(t / 16) pass the largest float32, e^88.7.
    assert abs(last["fastest"]["naive_broken_at"] - 88.7 / 2**-0.25) < 3
    assert abs(last["middle"]["naive_broken_at"] - 88.7 * 16) < 60
    assert last["slowest"]["naive_broken_at"] is None
    assert max(row["error"] for row in last.values()) < 1e-5
    # 1 - 3.9e-8 rounds to 1 - 6.0e-8: 2e-8 a step.
    assert 5e-5 < last["slowest"]["plain_error"] < 2e-4


def test_a_drift_is_an_error(capfd, monkeypatch):
    right = stream.lightning_attention_step

    def wrong(q, k, v, log_decay, state):
        return right(q, k, v, log_decay * (1 if state.dtype == stream.torch.float64 else 1.01), state)

    monkeypatch.setattr(stream, "lightning_attention_step", wrong)
    code, _, err = run(capfd, "--tokens", "1024")
    assert code == 1 and "float32 drifts from float64 by more than 0.0001" in err.splitlines()[-1]
